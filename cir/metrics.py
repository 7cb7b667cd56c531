"""Retrieval metrics in numpy: ranking a gallery block by block, recalls, and the bootstrap of a gain."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.errors import UserError

NO_IMAGE = -1  # in a ranking longer than its gallery; or a target that is not known
UNRANKED = np.inf  # rank of a target that is not known, or not in the gallery
ALIKE = 1e-6  # cosines float32 that differ by less are the same: two ways to sum one product round apart by as much


@dataclass(frozen=True)
class QuerySet:
    """What each query looks for, and among which images. Ids are int64 [queries]."""

    reference_ids: np.ndarray
    target_ids: np.ndarray  # NO_IMAGE where the target is not known
    remove_reference: bool = True
    galleries: tuple[np.ndarray, ...] | None = None  # sorted ids of the images of each gallery; None: every image
    gallery_of: np.ndarray | None = None  # int [queries], place in `galleries`

    def parts(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(queries, the gallery they search) of each gallery."""
        if self.galleries is None or self.gallery_of is None:
            return [(np.arange(len(self.reference_ids)), None)]
        return [(np.flatnonzero(self.gallery_of == i), gallery) for i, gallery in enumerate(self.galleries)]


@dataclass(frozen=True)
class Ranked:
    """A gallery ranked for each query."""

    image_ids: np.ndarray  # int64 [queries, top], best first
    scores: np.ndarray  # float32 [queries, top], their cosines; -inf past the gallery's end
    target_rank: np.ndarray  # float32 [queries], 1 is best: the expected rank of the target, or UNRANKED
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
    return rank_all(queries, blocks, [QuerySet(reference_ids, target_ids)], targets, top)[0]


def rank_all(
    queries: np.ndarray,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    searches: Sequence[QuerySet],
    targets: np.ndarray,
    top: int,
) -> list[Ranked]:
    """Rank a gallery given in blocks (ids [m], features [m, dim]) by cosine; no more than a block is held at a time.

    A target's rank is 1 + the images that score higher + half of those that score alike: what it has on average where ties
    are broken by chance, so that a model which tells nothing apart finds nothing. Every search ranks the same scores.
    `queries` and `targets` (the targets' own features) are [queries, dim]. Raises UserError when a vector is not finite:
    nothing scores higher than NaN, so its target would rank first.
    """
    queries = unit(_finite("query", queries))
    target_scores = np.einsum("qd,qd->q", queries, unit(_finite("target", targets)))
    rankers = [
        [_Ranker(search, rows, gallery, target_scores[rows], top) for rows, gallery in search.parts()] for search in searches
    ]
    for ids, features in blocks:
        scores = queries @ unit(_finite("gallery", features)).T
        for parts in rankers:
            for ranker in parts:
                ranker.add(ids, scores)
    return [_joined(parts, len(queries)) for parts in rankers]


def _finite(kind: str, vectors: np.ndarray) -> np.ndarray:
    """The same vectors [n, dim]."""
    if wrong := int((~np.isfinite(vectors)).any(axis=1).sum()):
        raise UserError(
            f"{wrong} of {len(vectors)} {kind} vectors are not finite: the training of the model that made them diverged; "
            "lower its learning rate, or take another model"
        )
    return vectors


class _Ranker:
    """The best images so far for the queries `rows` of a search, all of which search one gallery."""

    def __init__(
        self, search: QuerySet, rows: np.ndarray, gallery: np.ndarray | None, target_scores: np.ndarray, top: int
    ) -> None:
        self.rows, self.gallery, self.target_scores, self.top = rows, gallery, target_scores, top
        self.reference_ids, self.target_ids = search.reference_ids[rows], search.target_ids[rows]
        self.remove_reference = search.remove_reference
        self.higher, self.alike = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
        self.references = np.full(len(rows), -np.inf, np.float32)
        self.others = np.full(len(rows), -np.inf, np.float32)
        self.best_ids = np.full((len(rows), top), NO_IMAGE, np.int64)
        self.best = np.full((len(rows), top), -np.inf, np.float32)

    def add(self, ids: np.ndarray, scores: np.ndarray) -> None:
        """Scores [queries, ids] of a block, of all queries."""
        inside = np.arange(len(ids)) if self.gallery is None else np.flatnonzero(_contains(self.gallery, ids))
        if not len(inside):
            return
        ids, scores = ids[inside], scores[np.ix_(self.rows, inside)]
        reference = _places(ids, self.reference_ids)
        self.references[reference[0]] = scores[reference]
        scores[reference] = -np.inf
        self.others = np.maximum(self.others, scores.max(1))
        if not self.remove_reference:
            scores[reference] = self.references[reference[0]]
        above = scores - self.target_scores[:, None]
        above[_places(ids, self.target_ids)] = -np.inf
        higher = (above > ALIKE).sum(1, dtype=np.int32)
        self.higher += higher
        self.alike += (above >= -ALIKE).sum(1, dtype=np.int32) - higher
        best = _best(scores, self.top)
        scores = np.concatenate([self.best, np.take_along_axis(scores, best, axis=1)], axis=1)
        found = np.concatenate([self.best_ids, ids[best]], axis=1)
        order = _best(scores, self.top)
        self.best, self.best_ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(found, order, axis=1)

    def ranked(self) -> Ranked:
        """After the last block."""
        known = self.target_ids != NO_IMAGE
        if self.gallery is not None:
            known &= _contains(self.gallery, self.target_ids)
        image_ids = np.where(np.isneginf(self.best), NO_IMAGE, self.best_ids)
        ranks = np.where(known, 1 + self.higher + self.alike / 2, UNRANKED).astype(np.float32)
        return Ranked(image_ids, self.best, ranks, self.references > self.others)


def _joined(parts: list[_Ranker], queries: int) -> Ranked:
    """The rankings of a search's galleries, in the order of the queries."""
    found = [part.ranked() for part in parts]
    order = np.argsort(np.concatenate([part.rows for part in parts]), kind="stable")
    assert len(order) == queries, "each query searches one gallery"
    names = ("image_ids", "scores", "target_rank", "reference_first")
    return Ranked(*(np.concatenate([getattr(ranked, name) for ranked in found])[order] for name in names))


def _contains(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """bool, as `ids`: whether they are in a sorted array."""
    return known[np.searchsorted(known, ids).clip(max=len(known) - 1)] == ids


def _places(ids: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place in `wanted`, place in `ids`) of those that are in both; no id comes twice in `ids`."""
    order = np.argsort(ids)
    places = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    found = np.flatnonzero(ids[places] == wanted)
    return found, places[found]


def unit(features: np.ndarray) -> np.ndarray:
    """Vectors [..., dim] divided by their norms; a zero vector stays zero."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)


def _best(scores: np.ndarray, top: int) -> np.ndarray:
    """Places [queries, at most top] of the highest scores, best first."""
    places = np.argpartition(-scores, min(top, scores.shape[1]) - 1, axis=1)[:, :top]
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
    found = np.array([[classes.get(image, -1) for image in row] for row in image_ids.tolist()])
    return found == np.array([classes.get(target, -2) for target in target_ids.tolist()])[:, None]


def average_precision(correct: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """AP@K [queries]: the sum of the precision at each hit over min(right, K) (CIRCO, section 4).

    `correct` is bool [queries, >= k], best first, and `right` [queries] the number of right images of each query.
    """
    hits = correct[:, :k]
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(axis=1) / np.minimum(right, k)


@dataclass(frozen=True)
class RankedGroup:
    """A query's group, best first, without the reference."""

    image_ids: np.ndarray  # int64 [members]
    scores: np.ndarray  # [members]

    def rank_of(self, target: int) -> float:
        """The expected rank of a member, as in `rank_all`."""
        others = self.image_ids != target
        above = self.scores[others] - self.scores[~others]
        return float(1 + (above > ALIKE).sum() + (np.abs(above) <= ALIKE).sum() / 2)


def rank_groups(
    queries: np.ndarray, members: Sequence[np.ndarray], features: np.ndarray, reference_ids: np.ndarray
) -> list[RankedGroup]:
    """Each query's group by cosine.

    `members[i]` holds the ids of query i's group, and `features` the vectors [sum of members, dim] in the same order.
    """
    result = []
    ends = np.cumsum([len(ids) for ids in members])
    for i, ids in enumerate(members):
        scores = unit(features[ends[i] - len(ids) : ends[i]]) @ unit(queries[i])
        order = np.argsort(-scores, kind="stable")
        order = order[ids[order] != reference_ids[i]]
        result.append(RankedGroup(ids[order], scores[order]))
    return result


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval: percentage points, or a share."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    hits: np.ndarray, baseline: np.ndarray, classes: np.ndarray | None = None, resamples: int = 10_000
) -> Estimate:
    """Gain of `hits` over `baseline` with a cluster bootstrap's interval.

    Both are [generators, queries] in 0..1, averaged over seeds; those that use no generator have one row, or are [queries].
    Resampled with replacement are `classes`, int [queries], what each query asks for, and, independently, the generators.
    Queries for one thing are hit or missed together, so that as many independent ones would claim too narrow an interval;
    so do the queries of one generator. None: each query asks for its own.
    """
    differences = 100.0 * np.atleast_2d(hits - baseline)
    means = _resampled(differences[None], classes, resamples)[0]
    return Estimate(float(differences.mean()), *_interval(means))


def gap_closed(
    hits: np.ndarray, baseline: np.ndarray, best: np.ndarray, classes: np.ndarray | None = None, resamples: int = 10_000
) -> Estimate | None:
    """(hits - baseline) / (best - baseline), a share; resampled as `paired_bootstrap`. None where `best` gains nothing.

    Of the resamples those count in which `best` gains something: the others tell no share.
    """
    gain, whole = np.broadcast_arrays(100.0 * np.atleast_2d(hits - baseline), 100.0 * np.atleast_2d(best - baseline))
    if whole.mean() <= 0:
        return None
    means = _resampled(np.stack([gain, whole]), classes, resamples)
    told = means[:, means[1] > 0]
    if not told.size:
        return None
    return Estimate(float(gain.mean() / whole.mean()), *_interval(told[0] / told[1]))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _resampled(values: np.ndarray, classes: np.ndarray | None, resamples: int) -> np.ndarray:
    """Means float64 [k, resamples] of `values` [k, generators, queries] over classes and generators drawn with replacement.

    Of n generators n - 1 are drawn, which makes the variance of so few unbiased (Rao and Wu 1988); of one, that one.
    """
    _, generators, queries = values.shape
    _, places = np.unique(np.arange(queries) if classes is None else classes, return_inverse=True)
    counts = np.bincount(places)
    sums = np.stack([[np.bincount(places, row) for row in rows] for rows in values])  # [k, generators, classes]
    rng, means = np.random.default_rng(0), np.empty((len(values), resamples))
    for i in range(resamples):
        drawn = rng.integers(len(counts), size=len(counts))
        who = rng.integers(generators, size=generators - 1) if generators > 1 else [0]
        means[:, i] = sums[:, who][:, :, drawn].sum(axis=2).mean(axis=1) / counts[drawn].sum()
    return means
