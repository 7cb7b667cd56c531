"""The stage index: what a search shows of a gallery's images, small enough to be read in place."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Output, reject_row
from cluster.config import DecodeResources
from cluster.errors import Rejected
from cluster.parts import run_parts, timed
from cluster.stage import RunContext, Stage
from mining import tables
from mining.gallery import image_bytes
from mining.images import decode
from mining.scratch import shared
from mining.sources import BytesReader

if TYPE_CHECKING:
    import ray.data

SIDE = 256  # pixels of the longer side
QUALITY = 82
SHOWN = pa.schema([("image_id", pa.int64()), ("key", pa.string())])
PACK = pa.schema([("thumbnail", pa.large_binary())])  # JPEG, in the order of the rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Index(Stage):
    """`index:<gallery>`: the id and key of every image, and its thumbnail in a pack that is memory-mapped.

    A part's pack is an Arrow file `packs/part-00000.arrow`, written before its rows.
    """

    gallery: Stage
    side: int = SIDE
    quality: int = QUALITY
    resources: DecodeResources

    @property
    def reject_limit(self) -> float:
        """As many images may have become unreadable as the gallery may reject."""
        return self.gallery.reject_limit

    def work(self, output: Output, run: RunContext) -> None:
        """Decode every image once, part by part."""
        gallery = run.output(self.gallery)
        make = partial(_make_part, gallery=gallery, output=output, side=self.side, quality=self.quality)

        def dataset(names: list[str]) -> "ray.data.Dataset":
            """Tasks that decode the images of these parts."""
            import ray.data

            return ray.data.from_items([{"part": name} for name in names], override_num_blocks=len(names)).map_batches(
                make,
                batch_size=1,
                num_cpus=self.resources.decode_cpus,
                compute=ray.data.TaskPoolStrategy(size=self.resources.decode_tasks),
            )

        run_parts(output, gallery.part_rows(), dataset, run.monitor, "image")


@timed
def _make_part(row: dict[str, Any], gallery: Output, output: Output, side: int, quality: int) -> dict[str, Any]:
    name, reader = str(row["part"][0]), BytesReader()
    shown: list[dict[str, Any]] = []
    packed: list[bytes] = []
    rejects: list[dict[str, str]] = []
    for image in gallery.read_table(name, tables.GALLERY).to_pylist():
        try:
            packed.append(thumbnail(image_bytes(image, reader), side, quality))
            shown.append({"image_id": image["image_id"], "key": image["key"]})
        except (Rejected, OSError) as error:
            rejects.append(reject_row("index", image["key"], "unreadable", str(error)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PACK) as writer:
        writer.write_batch(pa.record_batch([pa.array(packed, pa.large_binary())], schema=PACK))
    output.write_bytes(_pack(name), sink.getvalue().to_pybytes())
    output.write_rejects(name, rejects)
    output.write_table(name, pa.Table.from_pylist(shown, SHOWN), SHOWN)
    return {"part": row["part"], "rows": np.array([len(shown) + len(rejects)])}


def _pack(part: str) -> str:
    return f"packs/{part.removesuffix('.parquet')}.arrow"


def thumbnail(content: bytes, side: int = SIDE, quality: int = QUALITY) -> bytes:
    """A JPEG whose longer side is at most `side` pixels, without what the image's file says beside its pixels.

    Raises Rejected when the image cannot be decoded.
    """
    image = decode(content)
    image.thumbnail((side, side))
    stream = BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def data_uri(jpeg: bytes) -> str:
    """A JPEG as a page holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


class Thumbnails(Mapping[int, bytes]):
    """The thumbnails of an index by image id, in no process's own memory."""

    def __init__(self, index: Output) -> None:
        parts = [index.read_table(part, SHOWN, ["image_id"])["image_id"].to_pylist() for part in index.parts()]
        self._packs = [_mapped(index, part) for part in index.parts()]
        self._places = {image_id: (part, row) for part, ids in enumerate(parts) for row, image_id in enumerate(ids)}

    def __getitem__(self, image_id: int) -> bytes:
        """Raises KeyError for an image that is not in the index."""
        part, row = self._places[image_id]
        return self._packs[part][row].as_py()

    def __iter__(self) -> Any:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _mapped(index: Output, part: str) -> pa.ChunkedArray:
    """A part's pack from the node's disk; one in an object store is copied there once."""
    path = Path(index.path(_pack(part)))
    if "://" in index.uri:
        path = shared(f"{index.uri}/{part}".encode(), ".arrow", lambda made: made.write_bytes(index.read_bytes(_pack(part))))
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["thumbnail"]
