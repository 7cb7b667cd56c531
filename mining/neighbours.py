"""Nearest neighbours of the images of a gallery, by FAISS; scores are exact whichever index found them."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np

from mining.config import IndexConfig
from mining.indexes import inverted_lists, kind_for

BLOCK = 4096  # queries searched at a time
RESCORED = 512  # queries whose neighbours' vectors are gathered at a time
FIRST_PROBES = 4  # lists searched at first, doubled until the recall is reached,
LAST_PROBES, LISTS_A_PROBE = 16, 32  # but at most so many, or one of so many
RECALL_QUERIES = 512
GPU_BYTES = 2**31  # of vectors that are on the GPU at a time
EPSILON = 1e-6  # two ways of computing one cosine differ by less
Block = tuple[np.ndarray, np.ndarray, np.ndarray]


class Neighbours:
    """Finds the `top` nearest of unit vectors float32 [n, dim], which may be memory-mapped.

    Small galleries are searched exactly, larger ones through one approximate index, which is searched as widely as the
    config's recall needs on a seeded sample of queries; what it finds is scored again by the vectors themselves. `report`
    says which index it is and its recall.
    """

    def __init__(self, vectors: np.ndarray, top: int, config: IndexConfig | None = None, seed: int = 0) -> None:
        config = config or IndexConfig()
        self.vectors, self.top = vectors, top
        kind = kind_for(config, len(vectors)) if top else "exact"
        self._index: Any = None if kind == "exact" else inverted_lists(vectors, kind, config.nlist)
        self.report: dict[str, Any] = {"index": kind, "images": len(vectors), "top": top, "recall": 1.0}
        if self._index is not None:
            self.report |= self._probe(config, np.random.default_rng(seed))

    def blocks(self, anchors: np.ndarray | None = None) -> Iterator[Block]:
        """Blocks (rows [b], neighbour rows [b, top], cosines [b, top]), most similar first, the image itself left out.

        `anchors` are the rows to search for (None: all). A place that no neighbour fills has row -1 and cosine -inf.
        """
        for rows in blocks_of(np.arange(len(self.vectors)) if anchors is None else anchors):
            yield rows, *self.search(rows)

    def search(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(neighbour rows [b, top], cosines [b, top]) of one block."""
        if self._index is None:
            return self._exact(rows)
        found = self._index.search(self.vectors[rows], min(self.top + 1, len(self.vectors)))[1]
        return _without_self(rows, *self._rescored(rows, found))

    def _exact(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        count = min(self.top + 1, len(self.vectors))
        scores, found = self._knn(self.vectors[rows], self.vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
        return _without_self(rows, found, scores)

    @cached_property
    def _knn(self) -> Callable[..., tuple[Any, Any]]:
        """FAISS's exact search, on the GPU of this process where it has one and FAISS is built for it.

        The GPU's has not been run on a GPU yet: only the choice is tested.
        """
        import faiss

        if getattr(faiss, "get_num_gpus", int)() > 0:
            return partial(faiss.knn_gpu, faiss.StandardGpuResources(), vectorsMemoryLimit=GPU_BYTES)
        return faiss.knn

    def _rescored(self, rows: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Approximate neighbours in the order of their cosines, computed again from the vectors, and those."""
        scores = np.empty(found.shape, np.float32)
        for first in range(0, len(rows), RESCORED):
            here = slice(first, first + RESCORED)
            scores[here] = np.einsum("bd,bkd->bk", self.vectors[rows[here]], self.vectors[found[here].clip(0)])
        scores[found < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)

    def _probe(self, config: IndexConfig, rng: np.random.Generator) -> dict[str, Any]:
        """Search the fewest lists that find the share `config.recall` of a sample's neighbours, or `config.nprobe` lists."""
        rows = np.sort(rng.choice(len(self.vectors), min(RECALL_QUERIES, len(self.vectors)), replace=False))
        last = self._exact(rows)[1][:, -1:]
        lists, recall = self._index.nlist, 0.0
        for probes in [config.nprobe] if config.nprobe else _doubled(FIRST_PROBES, max(lists // LISTS_A_PROBE, LAST_PROBES)):
            self._index.nprobe = min(probes, lists)
            recall = float((self.search(rows)[1] >= last - EPSILON).mean())
            if recall >= config.recall:
                break
        return {"nlist": lists, "nprobe": self._index.nprobe, "recall": round(recall, 4), "recall_queries": len(rows)}


def blocks_of(anchors: np.ndarray) -> list[np.ndarray]:
    """The rows that are searched at a time."""
    return np.array_split(anchors, -(-len(anchors) // BLOCK)) if len(anchors) else []


def _doubled(first: int, last: int) -> list[int]:
    """first, twice first and so on below last, and last."""
    return [first * 2**i for i in range(last.bit_length()) if first * 2**i < last] + [last]


def _without_self(rows: np.ndarray, found: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own image, or its last neighbour where copies of the image pushed it out."""
    own = found == rows[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(rows), found.shape[1] - 1)
    return found[~own].reshape(shape), scores[~own].reshape(shape)
