"""The stage ingest: from outside sources to checked gallery, triplet and caption tables."""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import AUTHORS, Output
from cluster.config import DecodeResources
from cluster.errors import Rejected, UserError
from cluster.parts import run_parts, timed
from cluster.stage import LOOKED_UP, Limit, RunContext, Source, Stage
from mining import tables
from mining.config import GalleryConfig
from mining.gallery import GROUPS, keys, part_name
from mining.images import checked_size, has_suffix, without_suffix
from mining.labelled import read_captions, read_triplets
from mining.rows import read_rows, strings
from mining.sources import LISTED_ROWS, BytesReader, counted, list_images, normal, read_names, reject

if TYPE_CHECKING:
    import ray.data

LEFT_OUT = "left_out.json"  # files of the source that are no images, by kind
_LOG = logging.getLogger(__name__)
_Row = dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Ingest(Stage):
    """Something from outside, checked row by row; bad rows are rejected with a reason."""

    version = 6
    table = "dataset"
    max_reject_fraction: Limit


@dataclass(frozen=True, eq=False, kw_only=True)
class IngestGallery(Ingest):
    """`ingest:<gallery>`: every image of a source, or its index, in parts of `shard_rows` or `shard_bytes`."""

    images: Source  # kept where the images are indexed in place
    splits: tuple[Source, ...] = ()
    without: Source | None = None  # the names to leave out
    shard_rows: int
    shard_bytes: int
    max_pixels: int
    resources: DecodeResources

    def work(self, output: Output, run: RunContext) -> None:
        """Check every image. Raises UserError when the source is missing or empty."""
        self.write(output, run, GalleryConfig(images=self.images.path, split=[split.path for split in self.splits] or None))

    def write(self, output: Output, run: RunContext, config: GalleryConfig) -> None:
        """Check the images that `config` lists, and write the gallery table."""
        index, rejects, left_out = list_images(config, self.images.field)
        output.write_rejects("listing.parquet", rejects)
        output.write_json(LEFT_OUT, left_out)
        if left_out:
            _LOG.info("%s: left out: %s", self.name, counted(left_out))
        if self.without is not None:
            index = index.filter(pc.invert(pc.is_in(index["key"], pa.array(list(read_names(self.without.path)), pa.string()))))
        names = (key for block in index.to_batches(LISTED_ROWS) for key in block["key"].to_pylist())
        tables.check_unique((tables.stable_id(self.name, key) for key in names), f"gallery {self.name}")
        starts = _starts(index["length"].to_numpy(), self.shard_rows, self.shard_bytes)
        shards = {part_name(i): index[first:last] for i, (first, last) in enumerate(pairwise(starts))}
        ingest = partial(
            _ingest_shard, output=output, gallery=self.name, copy_images=not self.images.kept, max_pixels=self.max_pixels
        )

        def dataset(names: list[str]) -> "ray.data.Dataset":
            """Tasks that check the images of these parts."""
            import ray.data

            blocks = [shards[n].append_column("part", pa.array([n] * len(shards[n]))) for n in names]
            return ray.data.from_arrow(blocks).map_batches(
                ingest,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self.resources.decode_cpus,
                compute=ray.data.TaskPoolStrategy(size=self.resources.decode_tasks),
            )

        run_parts(output, {name: len(shard) for name, shard in shards.items()}, dataset, run.monitor, "image")


@dataclass(frozen=True, eq=False, kw_only=True)
class IngestTriplets(Ingest):
    """`ingest:<triplets>`: labelled triplets of one or several files, and their groups where the rows list the images.

    Of the gallery only the images that the triplets name count: photos that come later leave the labels as they are.
    """

    gallery: Stage = field(metadata=LOOKED_UP)
    files: tuple[Source, ...]
    join: bool = False

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Of the files, and of the images that they name."""
        files, gallery = super().fingerprints, self.gallery.sources
        try:
            rows = [read_rows(source.path) for source in self.files]
        except UserError:  # it says so when it is ingested
            return files
        names = {normal(name) for name in set(strings(rows))}
        names |= {without_suffix(name) for name in names}
        return files | {field: _named(source.fingerprint(), names) for field, source in gallery.items()}

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when two files have the same name, or a group of the same name."""
        known, files = keys(run.output(self.gallery)), [source.path for source in self.files]
        triplets, groups, rejects = (
            list(chain.from_iterable(rows))
            for rows in zip(*(read_triplets(file, known, self.join) for file in files), strict=True)
        )
        tables.check_unique((row["triplet_id"] for row in triplets), f"triplets of {', '.join(files)}")
        tables.check_unique((row["group_id"] for row in groups), f"groups of {', '.join(files)}")
        if groups:
            output.write_table(GROUPS, pa.Table.from_pylist(groups, tables.GROUPS), tables.GROUPS)
        if authors := Counter(row["author"] for row in triplets if row["author"]):
            output.write_json(AUTHORS, authors)
        _write_rows(output, triplets, rejects, tables.TRIPLETS, run)


@dataclass(frozen=True, eq=False, kw_only=True)
class IngestCaptions(Ingest):
    """`ingest:<captions>`: a file's image-caption pairs."""

    gallery: Stage
    file: Source
    until: str | None = None

    def work(self, output: Output, run: RunContext) -> None:
        """Write them."""
        captions, rejects = read_captions(self.file.path, keys(run.output(self.gallery)), self.until)
        _write_rows(output, captions, rejects, tables.CAPTIONS, run)


def _starts(lengths: np.ndarray, most_rows: int, most_bytes: int) -> list[int]:
    """The first row of each part, and the number of rows: parts have at most so many rows and bytes, or are of one row."""
    ends, starts = np.cumsum(lengths), [0]
    while (first := starts[-1]) < len(lengths):
        fitting = int(np.searchsorted(ends, ends[first] - lengths[first] + most_bytes, side="right"))
        starts.append(min(max(fitting, first + 1), first + most_rows, len(lengths)))
    return starts


@timed
def _ingest_shard(index: pa.Table, output: Output, gallery: str, copy_images: bool, max_pixels: int) -> dict[str, list[Any]]:
    reader, rows, rejects = BytesReader(), [], []
    part = index["part"][0].as_py()
    for entry in index.to_pylist():
        try:
            content = reader.read(entry["uri"], entry["offset"], entry["length"])
            width, height = checked_size(content, max_pixels)
            place = {"uri": entry["uri"], "offset": entry["offset"], "length": len(content)}
            held = {"image": content} if copy_images else place
            image_id, sha256 = tables.stable_id(gallery, entry["key"]), hashlib.sha256(content).hexdigest()
            rows.append({"image_id": image_id, "key": entry["key"], "sha256": sha256, "width": width, "height": height, **held})
        except (Rejected, OSError) as error:
            reason = error.reason if isinstance(error, Rejected) else "unreadable"
            rejects.append(reject(entry["key"], reason, str(error)))
    output.write_rejects(part, rejects)
    output.write_table(part, pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    return {"part": [part], "rows": [len(index)]}


def _write_rows(output: Output, rows: list[_Row], rejects: list[_Row], schema: pa.Schema, run: RunContext) -> None:
    run.monitor.start(len(rows) + len(rejects), "row")
    output.write_rejects(part_name(0), rejects)
    output.write_table(part_name(0), pa.Table.from_pylist(rows, schema), schema)
    run.monitor.advance(len(rows) + len(rejects))


def _named(found: Any, names: set[str]) -> Any:
    """Of a fingerprint the image files that are named, and every other file: what an archive holds none can tell."""
    if not isinstance(found, list):
        return found
    paths = ((PurePosixPath(entry[0]), entry) for entry in found if isinstance(entry, tuple))
    return [entry for path, entry in paths if not has_suffix(path.name) or normal(str(path.with_suffix(""))) in names]
