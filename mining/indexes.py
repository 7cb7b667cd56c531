"""Which FAISS index searches a gallery of which size, and how it is made."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mining.config import IndexConfig
from mining.scratch import allocate, shared

EXACT_ROWS = 200_000  # larger galleries are searched through inverted lists
IN_MEMORY_ROWS = 1_000_000  # the lists of larger galleries lie on the node's disk
SHARD_ROWS = 200_000  # vectors that are searched, or added to lists, at a time
POINTS_A_LIST = 50  # vectors that each centroid is trained on
Kind = Literal["exact", "ivf", "ondisk"]


def kind_for(config: IndexConfig, rows: int) -> Kind:
    """The index of a gallery of so many images."""
    if config.kind != "auto":
        return config.kind
    if rows <= EXACT_ROWS:
        return "exact"
    return "ivf" if rows <= IN_MEMORY_ROWS else "ondisk"


def trained(vectors: np.ndarray, nlist: int | None) -> Any:
    """Empty inverted lists for half-precision copies of unit vectors float32 [n, dim], which may be memory-mapped."""
    import faiss

    rows, dim = vectors.shape
    lists = min(nlist or int(4 * np.sqrt(rows)), rows)
    half = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, half, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(rows, min(rows, POINTS_A_LIST * lists), replace=False)
    index.train(vectors[np.sort(sample)])
    return index


def filled(lists: Any, vectors: np.ndarray, on_disk: bool) -> Any:
    """The lists with the vectors in them: read into memory, 2 x dim bytes an image, or left in their file.

    The file is made once a node: whoever searches the same vectors, and a killed stage, finds it again.
    """
    import faiss

    content = hashlib.sha256(faiss.serialize_index(lists).tobytes() + bytes([on_disk]))
    for first in range(0, len(vectors), SHARD_ROWS):
        content.update(vectors[first : first + SHARD_ROWS].data)
    write = _write_on_disk if on_disk else _write
    folder = shared(content.digest(), ".lists", lambda partial: write(faiss.clone_index(lists), vectors, partial))
    return faiss.read_index(str(folder / "index"), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)


def _write(index: Any, vectors: np.ndarray, folder: Path) -> None:
    import faiss

    folder.mkdir()
    for first in range(0, len(vectors), SHARD_ROWS):
        index.add(vectors[first : first + SHARD_ROWS])
    faiss.write_index(index, str(folder / "index"))


def _write_on_disk(index: Any, vectors: np.ndarray, folder: Path) -> None:
    """Add the vectors shard by shard, each shard to a file of its own, and merge the files."""
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    folder.mkdir()
    shards: list[Path] = []
    for first in range(0, len(vectors), SHARD_ROWS):
        shard = faiss.clone_index(index)
        rows = np.arange(first, min(first + SHARD_ROWS, len(vectors)))
        shard.add_with_ids(vectors[first : rows[-1] + 1], rows)
        shards.append(folder / f"shard-{len(shards)}")
        faiss.write_index(shard, str(shards[-1]))
    room = folder / "lists"  # FAISS makes it anew, and fills it through a map
    allocate(room, len(vectors) * (index.code_size + 8))  # codes and ids
    room.unlink()
    merge_ondisk(index, [str(shard) for shard in shards], str(folder / "lists"))
    faiss.write_index(index, str(folder / "index"))
    for path in shards:
        path.unlink()
