"""Retrieval metrics in numpy: ranking a gallery block by block, recalls, and the bootstrap of a gain."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

NO_IMAGE = -1  # in a ranking longer than its gallery


@dataclass(frozen=True)
class Ranked:
    """A gallery ranked for each query, the query's reference removed."""

    image_ids: np.ndarray  # int64 [queries, top], best first
    target_rank: np.ndarray  # int32 [queries], 1 is best: 1 + the images that score higher than the target
    reference_first: np.ndarray  # bool [queries]: the reference, had it not been removed, would rank first


def rank(
    queries: np.ndarray,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    reference_ids: np.ndarray,
    target_ids: np.ndarray,
    targets: np.ndarray,
    top: int,
) -> Ranked:
    """Rank a gallery given in blocks (ids [m], features [m, dim]) by cosine; no more than a block is held at a time.

    `queries` and `targets` (the targets' own features) are [queries, dim]; ids are [queries].
    """
    queries, own = _unit(queries), np.arange(len(queries))
    target_scores = np.einsum("qd,qd->q", queries, _unit(targets))
    higher = np.zeros(len(queries), np.int32)
    references = np.full(len(queries), -np.inf, np.float32)
    best_ids = np.full((len(queries), top), NO_IMAGE, np.int64)
    best = np.full((len(queries), top), -np.inf, np.float32)
    for ids, features in blocks:
        scores = queries @ _unit(features).T
        is_reference = ids[None] == reference_ids[:, None]
        references = np.maximum(references, np.where(is_reference, scores, -np.inf).max(1))
        scores[is_reference] = -np.inf
        higher += ((scores > target_scores[:, None]) & (ids[None] != target_ids[:, None])).sum(1, dtype=np.int32)
        scores = np.concatenate([best, scores], axis=1)
        candidates = np.concatenate([best_ids, np.broadcast_to(ids, (len(queries), len(ids)))], axis=1)
        order = _best(scores, top)
        best, best_ids = scores[own[:, None], order], candidates[own[:, None], order]
    best_ids[np.isneginf(best)] = NO_IMAGE
    return Ranked(best_ids, higher + 1, references > best[:, 0])


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)


def _best(scores: np.ndarray, top: int) -> np.ndarray:
    """Places [queries, top] of the highest scores, best first."""
    places = np.argpartition(-scores, top - 1, axis=1)[:, :top]
    order = np.argsort(-np.take_along_axis(scores, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


def recall(ranks: np.ndarray, k: int) -> float:
    """Recall@K in percent from the targets' ranks [queries]."""
    return 100.0 * float(np.mean(ranks <= k))


def mean_reciprocal_rank(ranks: np.ndarray) -> float:
    """Mean of 1 / rank, in percent."""
    return 100.0 * float(np.mean(1.0 / ranks))


def correct_by_attributes(image_ids: np.ndarray, target_ids: np.ndarray, classes: dict[int, int]) -> np.ndarray:
    """bool [queries, top]: whether a retrieved image's attributes equal the target's.

    `classes` maps an image to a number that stands for its attributes; an image without attributes is never correct.
    """
    known = np.array(sorted(classes), np.int64)
    values = np.array([classes[i] for i in known.tolist()], np.int64)

    def of(ids: np.ndarray, otherwise: int) -> np.ndarray:
        places = np.searchsorted(known, ids).clip(max=len(known) - 1)
        return np.where(known[places] == ids, values[places], otherwise)

    return of(image_ids, -1) == of(target_ids, -2)[:, None]


def subset_ranks(
    queries: np.ndarray, members: Sequence[np.ndarray], features: np.ndarray, reference_ids: np.ndarray, target_ids: np.ndarray
) -> np.ndarray:
    """Rank int32 [queries] of the target inside each query's group, the reference removed; 1 is best.

    `members[i]` holds the ids of query i's group, and `features` the vectors [sum of members, dim] in the same order.
    """
    result = np.empty(len(queries), np.int32)
    ends = np.cumsum([len(ids) for ids in members])
    for i, ids in enumerate(members):
        scores = _unit(features[ends[i] - len(ids) : ends[i]]) @ queries[i]
        target_score = scores[ids == target_ids[i]][0]
        others = (ids != target_ids[i]) & (ids != reference_ids[i])
        result[i] = 1 + np.count_nonzero(scores[others] > target_score)
    return result


@dataclass(frozen=True)
class Gain:
    """Difference of two models in percentage points, with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(hits: np.ndarray, baseline: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Gain:
    """Gain of `hits` over `baseline`, both [queries] in 0..1 (averaged over seeds), resampling queries with replacement."""
    differences = 100.0 * (hits - baseline)
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(len(differences), size=len(differences))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Gain(float(differences.mean()), float(low), float(high))
