"""The official benchmarks by name, and their ingest: queries, images in place, and what must not be mined."""

from typing import Any

import pyarrow as pa

from cir.benchmarks.benchmark import GALLERY, Benchmark, Official
from cir.benchmarks.circo import CIRCO
from cir.benchmarks.cirr import CIRR
from cir.benchmarks.fashioniq import FASHIONIQ
from cir.config import Part
from cluster.artifacts import Output, below
from cluster.config import DecodeResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.config import GalleryConfig, IngestConfig
from mining.gallery import ingest_gallery, part_name
from mining.sources import list_images

BENCHMARK_VERSION = 1
OFFICIAL: dict[str, Official] = {"cirr": CIRR, "fashioniq": FASHIONIQ, "circo": CIRCO}
EXCLUDED = "excluded.parquet"
_SPLIT = "split.json"  # of an output: the names that the benchmark's files list, as ingest takes them


def files(benchmark: str, part: Part, annotations: str) -> list[str]:
    """The files of a benchmark's folder that `load` reads."""
    official = OFFICIAL[benchmark]
    return [f"{annotations.rstrip('/')}/{file}" for file in official.captions(part) + official.splits(part)]


def load(benchmark: str, part: Part, annotations: str, remove_reference: bool | None = None) -> Benchmark:
    """A benchmark from its own folder. Raises UserError naming the file that is wrong, what it holds and what it should."""
    return OFFICIAL[benchmark].load(annotations.rstrip("/"), part, remove_reference)


def names(benchmark: str, part: Part, annotations: str) -> dict[str, str | None]:
    """The images of a split, each with its path inside the folder of images where the benchmark's files give one."""
    return OFFICIAL[benchmark].names(annotations.rstrip("/"), part)


def ingest_queries(output: Output, benchmark: Benchmark, monitor: Monitor) -> None:
    """Write the queries as triplets."""
    monitor.start(len(benchmark.queries), "row")
    output.write_table(part_name(0), benchmark.table(), tables.TRIPLETS)
    monitor.advance(len(benchmark.queries))


def ingest_images(
    output: Output,
    known: dict[str, str | None],
    images: str,
    options: IngestConfig,
    resources: DecodeResources,
    monitor: Monitor,
) -> None:
    """The images of a benchmark as a gallery, indexed where they are; any other file of their folder is left alone.

    Raises UserError naming the absent ones: a benchmark is ranked whole.
    """
    config = _gallery(output, known, images)
    _, rejects = list_images(config, "evaluate.images")
    if absent := [row["key"] for row in rejects if row["reason"] == "missing_image"]:
        first = known[absent[0]] or f"{absent[0]}.<suffix>"
        raise UserError(
            f"evaluate.images: {len(absent):,} of the benchmark's {len(known):,} images are not in {images}, the first: "
            f"{images.rstrip('/')}/{first.removeprefix('./')}; bring them, or give the folder that they are in"
        )
    ingest_gallery(output, GALLERY, config, options, resources, monitor)


def _gallery(output: Output, known: dict[str, str | None], images: str) -> GalleryConfig:
    listed: Any = known if all(known.values()) else list(known)
    output.write_json(_SPLIT, listed)
    return GalleryConfig(images=images, split=below(output.uri, _SPLIT), copy_images=False)


def ingest_excluded(
    output: Output,
    name: str,
    benchmark: str,
    annotations: str,
    images: str | None,
    options: IngestConfig,
    resources: DecodeResources,
    monitor: Monitor,
) -> None:
    """What mining must leave out so that a benchmark's val and test stay unseen: `excluded.parquet` (tables.EXCLUDED).

    It holds the names of the images and the start of names that mark them, and content hashes where `images` are given;
    these are also the output's gallery `name`, indexed in place, for finding near duplicates. Without images it is empty.
    """
    known = names(benchmark, "val", annotations) | names(benchmark, "test", annotations)
    if images is None:
        output.write_table(part_name(0), tables.GALLERY.empty_table(), tables.GALLERY)
    else:
        ingest_gallery(output, name, _gallery(output, known, images), options, resources, monitor)
    gallery = output.read_parts(tables.GALLERY, ["key", "sha256"])
    hashes = dict(zip(gallery["key"].to_pylist(), gallery["sha256"].to_pylist(), strict=True))
    rows = [{"name": key, "is_prefix": False, "sha256": hashes.get(key)} for key in known]
    rows += [{"name": prefix, "is_prefix": True, "sha256": None} for prefix in OFFICIAL[benchmark].prefixes]
    output.write_table(EXCLUDED, pa.Table.from_pylist(rows, tables.EXCLUDED), tables.EXCLUDED)


def excluded_files(benchmark: str, annotations: str) -> list[str]:
    """The files of a benchmark's folder that `ingest_excluded` reads."""
    splits = OFFICIAL[benchmark].splits
    return [f"{annotations.rstrip('/')}/{file}" for file in dict.fromkeys(splits("val") + splits("test"))]
