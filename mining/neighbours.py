"""Nearest neighbours of the images of a gallery, by FAISS; scores are exact whichever index found them."""

from collections.abc import Iterator

import faiss
import numpy as np

EXACT_ROWS = 200_000  # larger galleries are searched through inverted lists
BLOCK = 4096  # queries searched at a time


def neighbours(
    vectors: np.ndarray, top: int, anchors: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks (rows [b], neighbour rows [b, top], cosines [b, top]), most similar first, the image itself left out.

    `vectors` is float32 [n, dim] with unit rows, `anchors` the rows to search for (None: all). A place that no neighbour
    fills has row -1 and cosine -inf.
    """
    index = _index(vectors)
    anchors = np.arange(len(vectors)) if anchors is None else anchors
    for rows in np.array_split(anchors, -(-len(anchors) // BLOCK)):
        scores, found = index.search(vectors[rows], min(top + 1, len(vectors)))
        if not isinstance(index, faiss.IndexFlatIP):
            scores, found = _exact_scores(vectors, rows, found)
        yield rows, *_without_self(rows, found, scores)


def _index(vectors: np.ndarray) -> faiss.Index:
    rows, dim = vectors.shape
    index: faiss.Index = faiss.IndexFlatIP(dim)
    if rows > EXACT_ROWS:
        lists = int(4 * np.sqrt(rows))
        index = faiss.IndexIVFFlat(index, dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(lists // 32, 16)
        sample = np.random.default_rng(0).choice(rows, min(rows, 50 * lists), replace=False)
        index.train(vectors[np.sort(sample)])
    index.add(vectors)
    return index


def _exact_scores(vectors: np.ndarray, rows: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of approximate neighbours computed again from the vectors, and their order by them."""
    scores = np.einsum("bd,bkd->bk", vectors[rows], vectors[found.clip(0)])
    scores[found < 0] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def _without_self(rows: np.ndarray, found: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop each row's own image, or its last neighbour where copies of the image pushed it out."""
    own = found == rows[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(rows), found.shape[1] - 1)
    return found[~own].reshape(shape), scores[~own].reshape(shape)
