"""Groups of six as the walk's, but with pairs that look like the labelled ones.

A departure from the paper, as matched pairs are; grouped, so that pseudo triplets are drawn in whole groups all the same.
"""

from collections.abc import Generator

import numpy as np

from mining.matched import Matcher
from mining.walk import GROUP_SIZE, PAIR_RANKS, Group

OFFERED = 1.5  # pairs of the drawn groups for each that is kept: six of a group's nine, on average
LEAST_PAIRS = 2  # a group with fewer is no group


def draw_groups(
    matcher: Matcher, anchors: np.ndarray, pairs: int, rng: np.random.Generator
) -> Generator[int, None, list[Group]]:
    """Groups of some `anchors`, as many as offer `pairs` x OFFERED pairs, or all there are.

    The five other images of a group are drawn from its anchor's candidates as matched pairs are, and stand by falling
    similarity to it, as in the walk. An anchor with fewer suitable candidates has no group. Yields the number of anchors
    searched, block by block.
    """
    groups: list[Group] = []
    wanted = -(-OFFERED * pairs // len(PAIR_RANKS))
    for rows, columns, scores in matcher.candidates(anchors):
        if len(groups) < wanted:
            groups += _draw(matcher, rows, columns, scores, rng)
        yield len(rows)
    return groups[: int(wanted)]


def _draw(matcher: Matcher, rows: np.ndarray, columns: np.ndarray, scores: np.ndarray, rng: np.random.Generator) -> list[Group]:
    """Without replacement and in proportion to the matched probability: the largest of log p + Gumbel noise are taken."""
    if columns.shape[1] < GROUP_SIZE - 1:
        return []
    with np.errstate(divide="ignore"):
        noisy = np.log(matcher.probability(scores)) + rng.gumbel(size=scores.shape)
    best = np.argpartition(-noisy, GROUP_SIZE - 2, axis=1)[:, : GROUP_SIZE - 1]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable"), 1)
    members = np.hstack([rows[:, None], np.take_along_axis(columns, best, 1)])
    suitable = np.isfinite(np.take_along_axis(noisy, best, 1)).all(axis=1)
    return [Group(tuple(group)) for group in members[suitable].tolist()]


def thin(matcher: Matcher, similarities: np.ndarray, group_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [m]: the pairs of the groups that are kept, so that their histogram is the labelled pairs'.

    The anchors' pairs are matched when drawn, those between the other images are not: all nine are thinned by the ratio of
    the histograms. Groups left with fewer than LEAST_PAIRS are dropped.
    """
    kept = rng.random(len(similarities)) < matcher.share_to_keep(similarities)
    _, group = np.unique(group_ids, return_inverse=True)
    return kept & (np.bincount(group, kept)[group] >= LEAST_PAIRS)
