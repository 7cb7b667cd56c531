"""Ingest: from outside sources to checked gallery, triplet and caption tables; and reading galleries back."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.artifacts import Output
from cluster.config import DecodeResources
from cluster.monitor import Monitor
from cluster.parts import run_parts
from mining import tables
from mining.config import CaptionsConfig, GalleryConfig, IngestConfig
from mining.images import BadImage, decode
from mining.labelled import read_captions, read_triplets
from mining.sources import LISTED_ROWS, BytesReader, list_images, reject

INGEST_VERSION = 3
GROUPS = "groups.parquet"
_Row = dict[str, Any]


def part_name(index: int) -> str:
    """File name of a main table's part."""
    return f"part-{index:05d}.parquet"


def ingest_gallery(
    output: Output, name: str, config: GalleryConfig, options: IngestConfig, resources: DecodeResources, monitor: Monitor
) -> None:
    """Check every image of a source and write the gallery table, or its index, in parts of `options.shard_rows`.

    Raises UserError when the source is missing or empty. Bad images are rejected with a reason.
    """
    index, rejects = list_images(config, f"ingest.galleries.{name}.images")
    output.write_rejects("listing.parquet", rejects)
    tables.check_unique((tables.stable_id(name, key) for key in _keys(index)), f"gallery {name}")
    starts = range(0, len(index), options.shard_rows)
    shards = {part_name(i): index.slice(start, options.shard_rows) for i, start in enumerate(starts)}
    ingest = partial(_ingest_shard, output=output, gallery=name, copy_images=config.copy_images, max_pixels=options.max_pixels)

    def dataset(names: list[str]) -> ray.data.Dataset:
        """Tasks that check the images of these parts."""
        blocks = [shards[n].append_column("part", pa.array([n] * len(shards[n]))) for n in names]
        return ray.data.from_arrow(blocks).map_batches(
            ingest,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=resources.decode_cpus,
            compute=ray.data.TaskPoolStrategy(size=resources.decode_tasks),
        )

    run_parts(output, {name: len(shard) for name, shard in shards.items()}, dataset, monitor, "image")


def _keys(index: pa.Table) -> Iterator[str]:
    return (key for block in index.to_batches(LISTED_ROWS) for key in block["key"].to_pylist())


def _ingest_shard(index: pa.Table, output: Output, gallery: str, copy_images: bool, max_pixels: int) -> dict[str, list[Any]]:
    reader, rows, rejects = BytesReader(), [], []
    part = index["part"][0].as_py()
    for entry in index.to_pylist():
        try:
            rows.append(_gallery_row(reader, entry, gallery, copy_images, max_pixels))
        except (BadImage, OSError) as error:
            reason = error.reason if isinstance(error, BadImage) else "unreadable"
            rejects.append(reject(entry["key"], reason, str(error)))
    output.write_rejects(part, rejects)
    output.write_table(part, pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    return {"part": [part], "rows": [len(index)]}


def _gallery_row(
    reader: BytesReader, entry: dict[str, Any], gallery: str, copy_images: bool, max_pixels: int
) -> dict[str, Any]:
    content = reader.read(entry["uri"], entry["offset"], entry["length"])
    image = decode(content, max_pixels)
    place = {} if copy_images else {"uri": entry["uri"], "offset": entry["offset"], "length": len(content)}
    return {
        "image_id": tables.stable_id(gallery, entry["key"]),
        "key": entry["key"],
        "image": content if copy_images else None,
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": image.width,
        "height": image.height,
        **place,
    }


def ingest_triplets(output: Output, gallery: Output, files: list[str], monitor: Monitor) -> None:
    """Write the labelled triplets of some files, and `groups.parquet` where their rows list the images of their groups.

    Raises UserError when two files have the same name, or a group of the same name.
    """
    known = keys(gallery)
    read = [read_triplets(file, known) for file in files]
    triplets, groups, rejects = (list(chain.from_iterable(rows)) for rows in zip(*read, strict=True))
    tables.check_unique((row["triplet_id"] for row in triplets), f"triplets of {', '.join(files)}")
    tables.check_unique((row["group_id"] for row in groups), f"groups of {', '.join(files)}")
    if groups:
        output.write_table(GROUPS, pa.Table.from_pylist(groups, tables.GROUPS), tables.GROUPS)
    _write_rows(output, triplets, rejects, tables.TRIPLETS, monitor)


def ingest_captions(output: Output, gallery: Output, config: CaptionsConfig, monitor: Monitor) -> None:
    """Write a file's image-caption pairs."""
    captions, rejects = read_captions(config.file, keys(gallery), config.until)
    _write_rows(output, captions, rejects, tables.CAPTIONS, monitor)


def _write_rows(output: Output, rows: list[_Row], rejects: list[_Row], schema: pa.Schema, monitor: Monitor) -> None:
    monitor.start(len(rows) + len(rejects), "row")
    output.write_rejects(part_name(0), rejects)
    output.write_table(part_name(0), pa.Table.from_pylist(rows, schema), schema)
    monitor.advance(len(rows) + len(rejects))


def keys(gallery: Output) -> dict[str, int]:
    """Image id of every key of a gallery."""
    table = gallery.read_parts(tables.GALLERY, ["key", "image_id"])
    return dict(zip(table["key"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def read_image_ids(gallery: Output) -> np.ndarray:
    """Image ids int64 [n] of a gallery."""
    return gallery.read_parts(tables.GALLERY, ["image_id"])["image_id"].to_numpy()


def image_bytes(row: _Row, reader: BytesReader) -> bytes:
    """Encoded bytes of a row of the gallery table. Raises OSError when an image indexed in place cannot be read any more."""
    return row["image"] or reader.read(row["uri"], row["offset"], row["length"])


def _rows_of(gallery: Output, part: str, image_ids: np.ndarray) -> pa.Table:
    """Some images' rows of a part; the bytes of a part that has none of them are not read."""
    wanted = pc.is_in(gallery.read_table(part, tables.GALLERY, ["image_id"])["image_id"], pa.array(image_ids, pa.int64()))
    found = gallery.read_table(part, tables.GALLERY) if pc.any(wanted).as_py() else None
    return tables.GALLERY.empty_table() if found is None else found.filter(wanted)


def read_images(galleries: Iterable[Output], image_ids: Iterable[int]) -> dict[int, bytes]:
    """Encoded bytes of some images, by id.

    Raises KeyError when one is in none of the galleries, OSError when one that is indexed in place cannot be read.
    """
    wanted = np.unique(np.fromiter(image_ids, np.int64))
    parts = (_rows_of(gallery, part, wanted) for gallery in galleries for part in gallery.parts())
    reader = BytesReader()
    found = {row["image_id"]: image_bytes(row, reader) for part in parts for row in part.to_pylist()}
    if missing := set(wanted.tolist()) - set(found):
        raise KeyError(f"{len(missing)} images are in none of the galleries, such as {min(missing)}")
    return found
