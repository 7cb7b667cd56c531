"""Retrieval metrics in numpy: ranking a gallery block by block, recalls, and the bootstrap of a gain."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

NO_IMAGE = -1  # in a ranking longer than its gallery; or a target that is not known
UNRANKED = 2**31 - 1  # rank of a target that is not known, or not in the gallery


@dataclass(frozen=True)
class Search:
    """What each query looks for, and among which images. Ids are int64 [queries]."""

    reference_ids: np.ndarray
    target_ids: np.ndarray  # NO_IMAGE where the target is not known
    remove_reference: bool = True
    galleries: tuple[np.ndarray, ...] | None = None  # sorted ids of the images of each gallery; None: every image
    gallery_of: np.ndarray | None = None  # int [queries], place in `galleries`

    def allows(self, ids: np.ndarray) -> np.ndarray:
        """bool [queries, ids], or [1, ids]: the images that each query may find."""
        if self.galleries is None or self.gallery_of is None:
            return np.ones((1, len(ids)), bool)
        return np.stack([_contains(gallery, ids) for gallery in self.galleries])[self.gallery_of]

    def has_target(self) -> np.ndarray:
        """bool [queries]: whether the target is known and can be found."""
        known = self.target_ids != NO_IMAGE
        if self.galleries is None or self.gallery_of is None:
            return known
        inside = np.stack([_contains(gallery, self.target_ids) for gallery in self.galleries])
        return known & inside[self.gallery_of, np.arange(len(known))]


@dataclass(frozen=True)
class Ranked:
    """A gallery ranked for each query."""

    image_ids: np.ndarray  # int64 [queries, top], best first
    target_rank: np.ndarray  # int32 [queries], 1 is best: 1 + the images that score higher than the target; or UNRANKED
    reference_first: np.ndarray  # bool [queries]: the reference ranks first, or would have, had it not been removed


def rank(
    queries: np.ndarray,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    reference_ids: np.ndarray,
    target_ids: np.ndarray,
    targets: np.ndarray,
    top: int,
) -> Ranked:
    """`rank_all` of one search over every image, the reference removed."""
    return rank_all(queries, blocks, [Search(reference_ids, target_ids)], targets, top)[0]


def rank_all(
    queries: np.ndarray,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    searches: Sequence[Search],
    targets: np.ndarray,
    top: int,
) -> list[Ranked]:
    """Rank a gallery given in blocks (ids [m], features [m, dim]) by cosine; no more than a block is held at a time.

    Every search ranks the same scores. `queries` and `targets` (the targets' own features) are [queries, dim].
    """
    queries = _unit(queries)
    target_scores = np.einsum("qd,qd->q", queries, _unit(targets))
    rankers = [_Ranker(search, target_scores, top) for search in searches]
    for ids, features in blocks:
        scores = queries @ _unit(features).T
        for ranker in rankers:
            ranker.add(ids, scores.copy())
    return [ranker.ranked() for ranker in rankers]


class _Ranker:
    """The best images of one search so far."""

    def __init__(self, search: Search, target_scores: np.ndarray, top: int) -> None:
        self.search, self.target_scores, self.top = search, target_scores, top
        count = len(target_scores)
        self.higher = np.zeros(count, np.int32)
        self.references = np.full(count, -np.inf, np.float32)
        self.others = np.full(count, -np.inf, np.float32)
        self.best_ids = np.full((count, top), NO_IMAGE, np.int64)
        self.best = np.full((count, top), -np.inf, np.float32)

    def add(self, ids: np.ndarray, scores: np.ndarray) -> None:
        """Scores [queries, ids] of a block, which are changed in place."""
        search = self.search
        is_reference = ids[None] == search.reference_ids[:, None]
        scores[~np.broadcast_to(search.allows(ids), scores.shape)] = -np.inf
        self.references = np.maximum(self.references, np.where(is_reference, scores, -np.inf).max(1))
        self.others = np.maximum(self.others, np.where(is_reference, -np.inf, scores).max(1))
        if search.remove_reference:
            scores[is_reference] = -np.inf
        is_higher = (scores > self.target_scores[:, None]) & (ids[None] != search.target_ids[:, None])
        self.higher += is_higher.sum(1, dtype=np.int32)
        scores = np.concatenate([self.best, scores], axis=1)
        candidates = np.concatenate([self.best_ids, np.broadcast_to(ids, is_reference.shape)], axis=1)
        order, own = _best(scores, self.top), np.arange(len(scores))[:, None]
        self.best, self.best_ids = scores[own, order], candidates[own, order]

    def ranked(self) -> Ranked:
        """After the last block."""
        self.best_ids[np.isneginf(self.best)] = NO_IMAGE
        ranks = np.where(self.search.has_target(), self.higher + 1, UNRANKED)
        return Ranked(self.best_ids, ranks.astype(np.int32), self.references > self.others)


def _contains(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """bool, as `ids`: whether they are in a sorted array."""
    return known[np.searchsorted(known, ids).clip(max=len(known) - 1)] == ids


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


def average_precision(correct: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """AP@K [queries]: the sum of the precision at each hit over min(right, K) (CIRCO, section 4).

    `correct` is bool [queries, >= k], best first, and `right` [queries] the number of right images of each query.
    """
    hits = correct[:, :k]
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(axis=1) / np.minimum(right, k)


def rank_groups(
    queries: np.ndarray, members: Sequence[np.ndarray], features: np.ndarray, reference_ids: np.ndarray
) -> list[np.ndarray]:
    """Ids of each query's group by cosine, best first, the reference removed.

    `members[i]` holds the ids of query i's group, and `features` the vectors [sum of members, dim] in the same order.
    """
    result = []
    ends = np.cumsum([len(ids) for ids in members])
    for i, ids in enumerate(members):
        scores = _unit(features[ends[i] - len(ids) : ends[i]]) @ queries[i]
        ranked = ids[np.argsort(-scores, kind="stable")]
        result.append(ranked[ranked != reference_ids[i]])
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
