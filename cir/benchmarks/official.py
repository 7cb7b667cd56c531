"""The official benchmarks by name, and their ingest: queries, images in place, and what must not be mined."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cir.benchmarks.benchmark import Benchmark, Official
from cir.benchmarks.circo import CIRCO
from cir.benchmarks.cirr import CIRR
from cir.benchmarks.fashioniq import FASHIONIQ
from cir.config import Part, Split
from cluster.artifacts import Output, below
from cluster.errors import UserError
from cluster.stage import RunContext, Source
from mining import tables
from mining.config import GalleryConfig
from mining.exclude import LISTING
from mining.gallery import part_name
from mining.ingest import Ingest, IngestGallery
from mining.sources import list_images

OFFICIAL: dict[str, Official] = {"cirr": CIRR, "fashioniq": FASHIONIQ, "circo": CIRCO}
_SPLIT = "split.json"  # of an output: the names that the benchmark's files list, as ingest takes them


@dataclass(frozen=True)
class Annotations(Source):
    """A benchmark's own folder: of one part of it, or with `part=None` of val and test, and `train`: what must not be mined."""

    benchmark: str = ""
    part: Part | None = None
    train: bool = False

    @property
    def _official(self) -> Official:
        return OFFICIAL[self.benchmark]

    @property
    def _splits(self) -> tuple[Split, ...]:
        if self.part is not None:
            return (self.part,)
        return ("train", "val", "test") if self.train else ("val", "test")

    @property
    def files(self) -> list[str]:
        """The files of the folder that are read."""
        names = [name for split in self._splits for name in self._official.splits(split)]
        if self.part is not None:
            names = self._official.captions(self.part) + names
        return [f"{self.path.rstrip('/')}/{name}" for name in dict.fromkeys(names)]

    def _each(self) -> dict[str, Source]:
        return {file: Source(self.field, file) for file in self.files}

    def fingerprint(self) -> Any:
        """Of those files alone."""
        found = {file.rpartition("/")[2]: source.fingerprint() for file, source in self._each().items()}
        return None if None in found.values() else found

    def problem(self) -> str:
        """Of each file that is missing."""
        return "; ".join(source.problem() for source in self._each().values() if source.fingerprint() is None)

    def load(self, remove_reference: bool | None = None) -> Benchmark:
        """The benchmark. Raises UserError naming the file that is wrong, what it holds and what it should."""
        assert self.part is not None
        return self._official.load(self.path.rstrip("/"), self.part, remove_reference)

    def names(self) -> dict[str, str | None]:
        """Its images, each with its path inside the folder of images where the benchmark's files give one."""
        return {
            name: path for split in self._splits for name, path in self._official.names(self.path.rstrip("/"), split).items()
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class IngestQueries(Ingest):
    """`ingest:queries` of an official benchmark: its queries as triplets."""

    annotations: Annotations

    def work(self, output: Output, run: RunContext) -> None:
        """One part."""
        benchmark = self.annotations.load()
        run.monitor.start(len(benchmark.queries), "row")
        output.write_table(part_name(0), benchmark.table(), tables.TRIPLETS)
        run.monitor.advance(len(benchmark.queries))


@dataclass(frozen=True, eq=False, kw_only=True)
class IngestImages(IngestGallery):
    """`ingest:evaluate` of an official benchmark: exactly the images that its split files list, where they are."""

    annotations: Annotations

    def work(self, output: Output, run: RunContext) -> None:
        """Any other file of the folder is left alone. Raises UserError naming the absent ones: a benchmark is ranked whole."""
        known, images = self.annotations.names(), self.images.path
        config = _gallery(output, known, images)
        rejects = list_images(config, self.images.field).rejects
        if absent := [row["key"] for row in rejects if row["reason"] == "missing_image"]:
            first = known[absent[0]] or f"{absent[0]}.<suffix>"
            raise UserError(
                f"{self.images.field}: {len(absent):,} of the benchmark's {len(known):,} images are not in {images}, the "
                f"first: {images.rstrip('/')}/{first.removeprefix('./')}; bring them, or give the folder that they are in"
            )
        self.write(output, run, config)


@dataclass(frozen=True, eq=False, kw_only=True)
class IngestExcluded(IngestGallery):
    """`ingest:excluded-<benchmark>`: what mining must leave out so that a benchmark's val and test stay unseen.

    Their images are the output's gallery, indexed in place, for finding near duplicates; beside it `excluded.parquet`
    (tables.EXCLUDED) holds their names and content hashes, and the start of names that mark them.
    """

    annotations: Annotations

    def work(self, output: Output, run: RunContext) -> None:
        """Write both."""
        self.write(output, run, _gallery(output, self.annotations.names(), self.images.path))
        _write_excluded(output, self.annotations)


@dataclass(frozen=True, eq=False, kw_only=True)
class IngestExcludedNames(Ingest):
    """As `IngestExcluded`, where the images are not given: an empty gallery, and no hashes."""

    annotations: Annotations

    def work(self, output: Output, run: RunContext) -> None:
        """Write both."""
        output.write_table(part_name(0), tables.GALLERY.empty_table(), tables.GALLERY)
        _write_excluded(output, self.annotations)


def _write_excluded(output: Output, annotations: Annotations) -> None:
    gallery = output.read_parts(tables.GALLERY, ["key", "sha256"])
    hashes = dict(zip(gallery["key"].to_pylist(), gallery["sha256"].to_pylist(), strict=True))
    rows = [{"name": key, "is_prefix": False, "sha256": hashes.get(key)} for key in annotations.names()]
    rows += [{"name": start, "is_prefix": True, "sha256": None} for start in OFFICIAL[annotations.benchmark].prefixes]
    output.write_table(LISTING, pa.Table.from_pylist(rows, tables.EXCLUDED), tables.EXCLUDED)


def _gallery(output: Output, known: dict[str, str | None], images: str) -> GalleryConfig:
    listed: Any = known if all(known.values()) else list(known)
    output.write_json(_SPLIT, listed)
    return GalleryConfig(images=images, split=below(output.uri, _SPLIT), copy_images=False)
