"""What a report shows of mined pairs: how similar they are, beside labelled pairs and the whole gallery."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from cluster.artifacts import Output
from mining import tables
from mining.features import ORIGIN, Features, centred, read_mean

SIMILARITIES = "similarities.json"  # histograms of gallery, labelled and mined pairs
HISTOGRAM_BINS = 40
HISTOGRAM_PAIRS = 20_000
COSINES = 4096  # pairs whose vectors are gathered at a time
IDS = ["reference_id", "target_id"]


def cosines(vectors: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Dot products float32 [m] of rows of unit vectors."""
    return _cosines(vectors.__getitem__, left, right)


def _cosines(vectors_of: Callable[[np.ndarray], np.ndarray], left: np.ndarray, right: np.ndarray) -> np.ndarray:
    values = np.empty(len(left), np.float32)
    for first in range(0, len(left), COSINES):
        here = slice(first, first + COSINES)
        values[here] = np.einsum("nd,nd->n", vectors_of(left[here]), vectors_of(right[here]))
    return values


def labelled_rows(ids: np.ndarray, labelled: Output | None) -> np.ndarray:
    """Rows [2, m] of references and targets among a gallery's `ids`, of the labelled pairs with both images there."""
    return _rows(ids, labelled.read_parts(tables.TRIPLETS, IDS)) if labelled else np.empty((2, 0), np.int64)


def _rows(ids: np.ndarray, pairs: pa.Table) -> np.ndarray:
    order = np.argsort(ids)
    wanted = np.stack([pairs[name].to_numpy() for name in IDS])
    rows = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return rows[:, (ids[rows] == wanted).all(axis=0)]


def write_similarities(
    output: Output, embeddings: Output, center: Output | None, ids: np.ndarray, labelled: Output | None, seed: int
) -> None:
    """Write densities over [-1, 1] of the cosine: of random pairs of the images `ids`, labelled and mined pairs.

    Centred where there is a `center`. Only the features of the images drawn are read.
    """
    rng, mined = np.random.default_rng(seed), output.read_parts(tables.PAIRS, IDS)
    mean = read_mean(center) if center else ORIGIN
    rows = {
        "gallery": rng.integers(len(ids), size=(2, HISTOGRAM_PAIRS)),
        "labelled": labelled_rows(ids, labelled),
        "mined": _rows(ids, mined.take(rng.permutation(len(mined))[:HISTOGRAM_PAIRS])),
    }
    features = Features(embeddings).open_plain(ids[np.unique(np.hstack(list(rows.values())))])
    edges, densities = np.linspace(-1, 1, HISTOGRAM_BINS + 1), {}

    def vectors(image_ids: np.ndarray) -> np.ndarray:
        return centred(features.take(image_ids, np.zeros(len(image_ids), int)).mean(axis=1), mean)

    for name, pairs in rows.items():
        if pairs.size:
            values = _cosines(vectors, *ids[pairs])
            densities[name] = np.histogram(values, edges, density=True)[0].tolist()
    output.write_json(SIMILARITIES, {"edges": edges.tolist(), **densities})
