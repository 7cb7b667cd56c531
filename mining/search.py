"""Searching the nearest of a gallery's vectors, by FAISS; scores are exact whichever index found them."""

from typing import Any, Protocol

import numpy as np

from mining.config import IndexConfig
from mining.indexes import SHARD_ROWS, filled, kind_for, trained

RESCORED = 512  # queries whose neighbours' vectors are gathered at a time
FIRST_PROBES = 4  # lists searched at first, doubled until the recall is reached,
LAST_PROBES, LISTS_A_PROBE = 16, 32  # but at most so many, or one of so many
RECALL_QUERIES = 512
EPSILON = 1e-6  # two ways of computing one cosine differ by less
TopK = tuple[np.ndarray, np.ndarray]  # (rows int64 [b, top], cosines float32 [b, top]), most similar first


class Search(Protocol):
    """Finds the nearest of unit vectors float32 [n, dim], which may be memory-mapped."""

    vectors: np.ndarray

    def __call__(self, queries: np.ndarray, count: int) -> TopK:
        """The `count` nearest of unit queries float32 [b, dim]; count is at most n.

        A place that none fills has row -1 and cosine -inf.
        """


def neighbours_of(search: Search, rows: np.ndarray, top: int) -> TopK:
    """Nearest of some of the vectors that are searched, each row itself left out; `top`, or as many as there are."""
    return without_self(rows, search(search.vectors[rows], min(top + 1, len(search.vectors))))


class Exact:
    """Every vector is compared, shard by shard: all need not fit in memory."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def __call__(self, queries: np.ndarray, count: int) -> TopK:
        """As `Search`."""
        import faiss

        best = empty(len(queries), count)
        for first in range(0, len(self.vectors), SHARD_ROWS):
            shard = self.vectors[first : first + SHARD_ROWS]
            scores, found = faiss.knn(queries, shard, min(count, len(shard)), metric=faiss.METRIC_INNER_PRODUCT)
            best = merged(best, (found + first, scores))
        return best


class Lists:
    """Through inverted lists of half-precision copies; what they find is scored again by the vectors themselves."""

    def __init__(self, vectors: np.ndarray, lists: Any) -> None:
        self.vectors, self.lists = vectors, lists

    def __call__(self, queries: np.ndarray, count: int) -> TopK:
        """As `Search`."""
        found = self.lists.search(queries, count)[1]
        scores = np.empty(found.shape, np.float32)
        for first in range(0, len(queries), RESCORED):
            here = slice(first, first + RESCORED)
            scores[here] = np.einsum("bd,bkd->bk", queries[here], self.vectors[found[here].clip(0)])
        scores[found < 0] = -np.inf
        return best_first(found, scores, count)


def plan(vectors: np.ndarray, top: int, config: IndexConfig, seed: int) -> tuple[dict[str, Any], Any]:
    """Which inverted lists to search, how widely and with which recall; and those lists, trained and empty.

    They are searched as widely as the config's recall needs on a seeded sample of queries.
    """
    kind = kind_for(config, len(vectors))
    lists = trained(vectors, config.nlist)
    search = Lists(vectors, filled(lists, vectors, kind == "ondisk"))
    probed = _probe(search, top, config, np.random.default_rng(seed))
    return {"index": kind, "images": len(vectors), "top": top, **probed}, lists


def _probe(search: Lists, top: int, config: IndexConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Search the fewest lists that find the share `config.recall` of a sample's neighbours, or `config.nprobe` lists."""
    rows = np.sort(rng.choice(len(search.vectors), min(RECALL_QUERIES, len(search.vectors)), replace=False))
    last = neighbours_of(Exact(search.vectors), rows, top)[1][:, -1:]
    lists, recall = search.lists.nlist, 0.0
    for probes in [config.nprobe] if config.nprobe else _doubled(FIRST_PROBES, max(lists // LISTS_A_PROBE, LAST_PROBES)):
        search.lists.nprobe = min(probes, lists)
        recall = float((neighbours_of(search, rows, top)[1] >= last - EPSILON).mean())
        if recall >= config.recall:
            break
    return {"nlist": lists, "nprobe": search.lists.nprobe, "recall": round(recall, 4), "recall_queries": len(rows)}


def _doubled(first: int, last: int) -> list[int]:
    """first, twice first and so on below last, and last."""
    return [first * 2**i for i in range(last.bit_length()) if first * 2**i < last] + [last]


def empty(rows: int, count: int) -> TopK:
    """Nothing found yet."""
    return np.full((rows, count), -1), np.full((rows, count), -np.inf, np.float32)


def merged(best: TopK, more: TopK) -> TopK:
    """The best of both, as many as `best` has places."""
    rows, scores = (np.hstack(both) for both in zip(best, more, strict=True))
    return best_first(rows, scores, best[0].shape[1])


def best_first(rows: np.ndarray, scores: np.ndarray, count: int) -> TopK:
    """The `count` of the highest scores, in their order."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def without_self(rows: np.ndarray, best: TopK) -> TopK:
    """Drop each row's own image, or its last neighbour where copies of the image pushed it out."""
    found, scores = best
    own = found == rows[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(rows), found.shape[1] - 1)
    return found[~own].reshape(shape), scores[~own].reshape(shape)


def limit_faiss_threads(cpus: float) -> None:
    """Give FAISS as many threads as Ray gave this process CPUs."""
    import faiss

    faiss.omp_set_num_threads(max(int(cpus), 1))
