"""A gallery's images, as ingest wrote them: their names, ids and bytes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Output
from mining import tables
from mining.scratch import shared
from mining.sources import BytesReader

HELD_IMAGES = 2048  # encoded images that a process may hold in its own memory
GROUPS = "groups.parquet"  # of triplets: the images of their groups, where their rows list them
_Row = dict[str, Any]


def part_name(index: int) -> str:
    """File name of a main table's part."""
    return f"part-{index:05d}.parquet"


def keys(gallery: Output) -> dict[str, int]:
    """Image id of every key of a gallery."""
    table = gallery.read_parts(tables.GALLERY, ["key", "image_id"])
    return dict(zip(table["key"].to_pylist(), table["image_id"].to_pylist(), strict=True))


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
    return {int(wanted[place]): content for place, content in _encoded(galleries, wanted)}


def _encoded(galleries: Iterable[Output], image_ids: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """(place among the sorted ids, bytes), part by part. Raises KeyError at the end when an image is in none."""
    found, reader = np.zeros(len(image_ids), bool), BytesReader()
    for part in (_rows_of(gallery, name, image_ids) for gallery in galleries for name in gallery.parts()):
        for row in part.to_pylist():
            place = int(np.searchsorted(image_ids, row["image_id"]))
            found[place] = True
            yield place, image_bytes(row, reader)
    if len(missing := image_ids[~found]):
        raise KeyError(f"{len(missing)} images are in none of the galleries, such as {missing[0]}")


def encoded_images(galleries: Sequence[Output], image_ids: np.ndarray) -> Mapping[int, bytes]:
    """As `read_images`; more than a few are memory-mapped, from files that the node's processes share."""
    ids = np.unique(image_ids)
    return read_images(galleries, ids) if len(ids) <= HELD_IMAGES else _Mapped(galleries, ids)


class _Mapped(Mapping[int, bytes]):
    """Encoded bytes of some images, one behind the other in one file, made once a node (`mining.scratch`)."""

    def __init__(self, galleries: Sequence[Output], image_ids: np.ndarray) -> None:
        key = repr(("images", *galleries)).encode() + image_ids.tobytes()
        folder = shared(key, ".images", partial(_write_encoded, galleries, image_ids))
        self._ids, self._bytes = image_ids, np.memmap(folder / "bytes", np.uint8, mode="r")
        self._places = np.load(folder / "places.npy", mmap_mode="r")  # first byte and length of each

    def __getitem__(self, image_id: int) -> bytes:
        row = int(np.searchsorted(self._ids, image_id))
        if row == len(self._ids) or self._ids[row] != image_id:
            raise KeyError(image_id)
        first, length = self._places[row].tolist()
        return self._bytes[first : first + length].tobytes()

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    def __len__(self) -> int:
        return len(self._ids)


def _write_encoded(galleries: Sequence[Output], image_ids: np.ndarray, folder: Path) -> None:
    folder.mkdir()
    places, end = np.empty((len(image_ids), 2), np.int64), 0
    with (folder / "bytes").open("wb") as file:
        for place, content in _encoded(galleries, image_ids):
            places[place] = end, len(content)
            end += file.write(content)
    np.save(folder / "places.npy", places)
