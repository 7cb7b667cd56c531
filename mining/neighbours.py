"""Nearest neighbours of the images of a gallery, by FAISS; scores are exact whichever index found them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

EXACT_ROWS = 200_000  # larger galleries are searched through inverted lists
BLOCK = 4096  # queries searched at a time
Block = tuple[np.ndarray, np.ndarray, np.ndarray]


class Neighbours:
    """Searches unit vectors float32 [n, dim]: small galleries as they lie in memory, large ones through one index."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self._index = _inverted_lists(vectors) if len(vectors) > EXACT_ROWS else None

    def blocks(self, top: int, anchors: np.ndarray | None = None) -> Iterator[Block]:
        """Blocks (rows [b], neighbour rows [b, top], cosines [b, top]), most similar first, the image itself left out.

        `anchors` are the rows to search for (None: all). A place that no neighbour fills has row -1 and cosine -inf.
        """
        anchors = np.arange(len(self.vectors)) if anchors is None else anchors
        for rows in np.array_split(anchors, -(-len(anchors) // BLOCK)):
            scores, found = self._search(rows, min(top + 1, len(self.vectors)))
            yield rows, *_without_self(rows, found, scores)

    def _search(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        if self._index is None:
            return faiss.knn(self.vectors[rows], self.vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
        return self._exact_scores(rows, self._index.search(self.vectors[rows], count)[1])

    def _exact_scores(self, rows: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines of approximate neighbours computed again from the vectors, and their order by them."""
        scores = np.einsum("bd,bkd->bk", self.vectors[rows], self.vectors[found.clip(0)])
        scores[found < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def _inverted_lists(vectors: np.ndarray) -> Any:
    """An index of half-precision copies of the vectors."""
    import faiss

    rows, dim = vectors.shape
    lists = int(4 * np.sqrt(rows))
    half = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, half, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(lists // 32, 16)
    sample = np.random.default_rng(0).choice(rows, min(rows, 50 * lists), replace=False)
    index.train(vectors[np.sort(sample)])
    index.add(vectors)
    return index


def _without_self(rows: np.ndarray, found: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own image, or its last neighbour where copies of the image pushed it out."""
    own = found == rows[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(rows), found.shape[1] - 1)
    return found[~own].reshape(shape), scores[~own].reshape(shape)
