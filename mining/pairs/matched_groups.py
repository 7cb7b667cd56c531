"""Groups of six as the walk's, but with pairs that look like the labelled ones.

A departure from the paper, as matched pairs are; grouped, so that pseudo triplets are drawn in whole groups all the same.
"""

from collections.abc import Generator, Iterator

import numpy as np

from mining.pairs.job import Mining
from mining.pairs.matched import Matcher, matcher_of
from mining.pairs.similarities import cosines
from mining.pairs.walk import GROUP_SIZE, PAIR_RANKS, members, pairs_of, without_overlap, write_grouped

OFFERED = 1.5  # pairs of the drawn groups for each that is kept: six of a group's nine, on average
LEAST_PAIRS = 2  # a group with fewer is no group


def write_groups(job: Mining) -> Iterator[int]:
    """Drawn in one go. Yields the number of anchors searched or not needed, block by block."""
    ids, cosine = job.vectors(job.mean)
    matcher, rng = matcher_of(job, ids, cosine), np.random.default_rng(job.seed)
    drawn = yield from draw_groups(matcher, rng.permutation(len(ids)), job.config.matched.pairs, rng)
    groups = without_overlap(drawn, len(ids), job.config.walk)
    group, place = pairs_of(groups, len(ids))
    kept = thin(matcher, cosines(cosine, *members(groups, group, place)), group, rng)
    write_grouped(job, ids, cosine, groups, group[kept], place[kept])


def draw_groups(
    matcher: Matcher, anchors: np.ndarray, pairs: int, rng: np.random.Generator
) -> Generator[int, None, np.ndarray]:
    """Groups [m, 6] of some `anchors`, as many as offer `pairs` x OFFERED pairs, or all there are.

    The five other images of a group are drawn from its anchor's candidates as matched pairs are, and stand by falling
    similarity to it, as in the walk. An anchor with fewer suitable candidates has no group. Yields the number of anchors
    searched or not needed, block by block.
    """
    drawn = [np.empty((0, GROUP_SIZE), np.int64)]
    wanted, left = int(-(-OFFERED * pairs // len(PAIR_RANKS))), len(anchors)
    for rows, columns, scores in matcher.candidates(anchors, rng):
        drawn.append(_draw(matcher, rows, columns, scores, rng))
        left -= len(rows)
        yield len(rows)
        if sum(map(len, drawn)) >= wanted:
            yield left
            break
    return np.concatenate(drawn)[:wanted]


def _draw(matcher: Matcher, rows: np.ndarray, columns: np.ndarray, scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Without replacement and in proportion to the matched probability: the largest of log p + Gumbel noise are taken."""
    if columns.shape[1] < GROUP_SIZE - 1:
        return np.empty((0, GROUP_SIZE), np.int64)
    with np.errstate(divide="ignore"):
        noisy = np.log(matcher.probability(scores)) + rng.gumbel(size=scores.shape)
    best = np.argpartition(-noisy, GROUP_SIZE - 2, axis=1)[:, : GROUP_SIZE - 1]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable"), 1)
    groups = np.hstack([rows[:, None], np.take_along_axis(columns, best, 1)])
    return groups[np.isfinite(np.take_along_axis(noisy, best, 1)).all(axis=1)]


def thin(matcher: Matcher, similarities: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [m]: the pairs that are kept, so that their histogram is the labelled pairs'; `groups` says of each its group.

    The anchors' pairs are matched when drawn, those between the other images are not: all nine are thinned by the ratio of
    the histograms. Groups left with fewer than LEAST_PAIRS are dropped.
    """
    kept = rng.random(len(similarities)) < matcher.share_to_keep(similarities)
    return kept & (np.bincount(groups, kept)[groups] >= LEAST_PAIRS)
