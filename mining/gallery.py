"""Ingest: from outside sources to checked gallery, triplet and caption tables; and reading galleries back."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from cluster.artifacts import Output, filesystem
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.parts import run_parts
from mining import tables
from mining.config import CaptionsConfig, GalleryConfig, IngestConfig
from mining.images import BadImage, decode
from mining.sources import BytesReader, list_images

INGEST_VERSION = 1


def part_name(index: int) -> str:
    """File name of a main table's part."""
    return f"part-{index:05d}.parquet"


def ingest_gallery(
    output: Output, name: str, config: GalleryConfig, options: IngestConfig, resources: ActorResources, monitor: Monitor
) -> None:
    """Check every image of a source and write the gallery table, or its index, in parts of `options.shard_rows`.

    Raises UserError when the source is missing or empty. Bad images are rejected with a reason.
    """
    index, rejects = list_images(config, f"ingest.galleries.{name}.images")
    output.write_rejects("listing.parquet", rejects)
    tables.check_unique((tables.stable_id(name, key) for key in index["key"].to_pylist()), f"gallery {name}")
    starts = range(0, len(index), options.shard_rows)
    shards = {part_name(i): index.slice(start, options.shard_rows) for i, start in enumerate(starts)}
    ingest = partial(_ingest_shard, output=output, gallery=name, copy_images=config.copy_images, max_pixels=options.max_pixels)

    def dataset(names: list[str]) -> ray.data.Dataset:
        blocks = [shards[n].append_column("part", pa.array([n] * len(shards[n]))) for n in names]
        return ray.data.from_arrow(blocks).map_batches(
            ingest,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=resources.decode_cpus,
            compute=ray.data.TaskPoolStrategy(size=resources.decode_tasks),
        )

    run_parts(output, {name: len(shard) for name, shard in shards.items()}, dataset, monitor, "image")


def _ingest_shard(index: pa.Table, output: Output, gallery: str, copy_images: bool, max_pixels: int) -> dict[str, list[Any]]:
    reader, rows, rejects = BytesReader(), [], []
    part = index["part"][0].as_py()
    for entry in index.to_pylist():
        try:
            rows.append(_gallery_row(reader, entry, gallery, copy_images, max_pixels))
        except (BadImage, OSError) as error:
            reason = error.reason if isinstance(error, BadImage) else "unreadable"
            rejects.append({"key": entry["key"], "stage": "ingest", "reason": reason, "detail": str(error)[:200]})
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


def ingest_triplets(output: Output, gallery: Output, file: str, monitor: Monitor) -> None:
    """Write a file's labelled triplets; rows with unknown images or without text are rejected."""
    known = keys(gallery)
    rows, rejects = [], []
    for position, entry in enumerate(read_rows(file)):
        try:
            rows.append(_triplet_row(entry, position, known, file))
        except BadImage as error:
            rejects.append({"key": _name(entry, position), "stage": "ingest", "reason": error.reason, "detail": error.detail})
    tables.check_unique((row["triplet_id"] for row in rows), file)
    _write_rows(output, rows, rejects, tables.TRIPLETS, monitor)


def ingest_captions(output: Output, gallery: Output, config: CaptionsConfig, monitor: Monitor) -> None:
    """Write a file's image-caption pairs; rows with an unknown image or without text are rejected."""
    known = keys(gallery)
    rows, rejects = [], []
    for position, entry in enumerate(read_rows(config.file)):
        text = str(entry.get("caption") or "")
        text = (text.split(config.until)[0] if config.until else text).strip()
        image = known.get(entry.get("image", ""))
        if image is None or not text:
            reason, detail = ("unknown_image", str(entry.get("image"))) if image is None else ("empty_caption", "")
            rejects.append({"key": _name(entry, position), "stage": "ingest", "reason": reason, "detail": detail})
        else:
            rows.append({"image_id": image, "caption": text})
    _write_rows(output, rows, rejects, tables.CAPTIONS, monitor)


def _write_rows(
    output: Output, rows: list[dict[str, Any]], rejects: list[dict[str, str]], schema: pa.Schema, monitor: Monitor
) -> None:
    monitor.start(len(rows) + len(rejects), "row")
    output.write_rejects(part_name(0), rejects)
    output.write_table(part_name(0), pa.Table.from_pylist(rows, schema), schema)
    monitor.advance(len(rows) + len(rejects))


def read_rows(file: str) -> list[dict[str, Any]]:
    """Rows of a JSON list or a Parquet file. Raises UserError naming the file when it is neither."""
    system, path = filesystem(file)
    try:
        with system.open_input_file(path) as stream:
            content = pq.read_table(stream).to_pylist() if path.endswith(".parquet") else json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a JSON list or Parquet table: {error}") from error
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{file}: expected a list of rows such as {{'reference': ..., 'target': ..., 'captions': [...]}}")
    return content


def _name(entry: dict[str, Any], position: int) -> str:
    return str(entry.get("pairid", f"row {position}"))


def _triplet_row(entry: dict[str, Any], position: int, known: dict[str, int], file: str) -> dict[str, Any]:
    """One row in the terms of any of the field's files: FashionIQ's `candidate`, CIRR's `target_hard` and `img_set`."""
    images = {}
    for role, other in (("reference", "candidate"), ("target", "target_hard")):
        key = entry.get(role, entry.get(other))
        if key not in known:
            raise BadImage("unknown_image", f"{role} {key!r} is not in the gallery")
        images[f"{role}_id"] = known[key]
    texts = entry.get("captions", entry.get("caption", []))
    deltas = [text.strip() for text in ([texts] if isinstance(texts, str) else texts) if text and text.strip()]
    if not deltas:
        raise BadImage("empty_delta", "the row has no text")
    group = entry.get("group", (entry.get("img_set") or {}).get("id"))
    return {
        "triplet_id": tables.stable_id(file.rsplit("/", 1)[-1], _name(entry, position)),
        "group_id": None if group is None else tables.stable_id("group", group),
        **images,
        "deltas": deltas,
        "source": "human",
    }


def keys(gallery: Output) -> dict[str, int]:
    """Image id of every key of a gallery."""
    table = gallery.read_parts(tables.GALLERY, ["key", "image_id"])
    return dict(zip(table["key"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def iter_images(gallery: Output, part: str, image_ids: np.ndarray | None = None) -> Iterator[tuple[int, bytes]]:
    """(image_id, encoded bytes) of one part's images, in order; of all or of those asked for."""
    table = gallery.read_table(part, tables.GALLERY) if image_ids is None else _rows_of(gallery, part, image_ids)
    reader = BytesReader()
    for batch in table.to_batches(max_chunksize=256):
        for row in batch.to_pylist():
            yield row["image_id"], row["image"] or reader.read(row["uri"], row["offset"], row["length"])


def _rows_of(gallery: Output, part: str, image_ids: np.ndarray) -> pa.Table:
    """Some images' rows of a part; the bytes of a part that has none of them are not read."""
    wanted = pc.is_in(gallery.read_table(part, tables.GALLERY, ["image_id"])["image_id"], pa.array(image_ids, pa.int64()))
    found = gallery.read_table(part, tables.GALLERY) if pc.any(wanted).as_py() else None
    return tables.GALLERY.empty_table() if found is None else found.filter(wanted)


def read_images(galleries: Iterable[Output], image_ids: Iterable[int]) -> dict[int, bytes]:
    """Encoded bytes of some images, by id. Raises KeyError when one is in none of the galleries."""
    wanted = np.unique(np.fromiter(image_ids, np.int64))
    parts = [(gallery, part) for gallery in galleries for part in gallery.parts()]
    found = {i: content for gallery, part in parts for i, content in iter_images(gallery, part, wanted)}
    if missing := set(wanted.tolist()) - set(found):
        raise KeyError(f"{len(missing)} images are in none of the galleries, such as {min(missing)}")
    return found
