"""Which FAISS index searches a gallery of which size, and how it is made."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mining.config import IndexConfig
from mining.scratch import shared

EXACT_ROWS = 200_000  # larger galleries are searched through inverted lists
IN_MEMORY_ROWS = 1_000_000  # the lists of larger galleries lie on the node's disk
SHARD_ROWS = 200_000  # vectors that are added in memory before they are merged into the lists on disk
POINTS_A_LIST = 50  # vectors that each centroid is trained on
Kind = Literal["exact", "ivf", "ondisk"]


def kind_for(config: IndexConfig, rows: int) -> Kind:
    """The index of a gallery of so many images."""
    if config.kind != "auto":
        return config.kind
    if rows <= EXACT_ROWS:
        return "exact"
    return "ivf" if rows <= IN_MEMORY_ROWS else "ondisk"


def inverted_lists(vectors: np.ndarray, kind: Kind, nlist: int | None) -> Any:
    """An index of half-precision copies of unit vectors float32 [n, dim], which may be memory-mapped.

    `ivf` holds the copies in memory, 2 x dim bytes an image; `ondisk` in a file that the node's processes share, so that a
    killed stage finds it again.
    """
    lists = min(nlist or int(4 * np.sqrt(len(vectors))), len(vectors))
    if kind == "ondisk":
        return _on_disk(vectors, lists)
    index = _trained(vectors, lists)
    index.add(vectors)
    return index


def _trained(vectors: np.ndarray, lists: int) -> Any:
    import faiss

    rows, dim = vectors.shape
    half = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, half, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(rows, min(rows, POINTS_A_LIST * lists), replace=False)
    index.train(vectors[np.sort(sample)])
    return index


def _on_disk(vectors: np.ndarray, lists: int) -> Any:
    import faiss

    content = hashlib.sha256(repr((vectors.shape, lists)).encode())
    for first in range(0, len(vectors), SHARD_ROWS):
        content.update(vectors[first : first + SHARD_ROWS].data)
    folder = shared(content.digest(), ".lists", lambda partial: _write_lists(vectors, lists, partial))
    return faiss.read_index(str(folder / "index"), faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)


def _write_lists(vectors: np.ndarray, lists: int, folder: Path) -> None:
    """Add the vectors shard by shard, each shard to a file of its own, and merge the files."""
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    folder.mkdir()
    index = _trained(vectors, lists)
    shards: list[Path] = []
    for first in range(0, len(vectors), SHARD_ROWS):
        shard = faiss.clone_index(index)
        rows = np.arange(first, min(first + SHARD_ROWS, len(vectors)))
        shard.add_with_ids(vectors[first : rows[-1] + 1], rows)
        shards.append(folder / f"shard-{len(shards)}")
        faiss.write_index(shard, str(shards[-1]))
    merge_ondisk(index, [str(shard) for shard in shards], str(folder / "lists"))
    faiss.write_index(index, str(folder / "index"))
    for path in shards:
        path.unlink()
