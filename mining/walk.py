"""The paper's pairs: a walk down each anchor's ranking gives groups of six, and each group nine ordered pairs."""

from collections import defaultdict
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np

from mining.config import WalkConfig
from mining.neighbours import Neighbours

GROUP_SIZE = 6  # images of a group, the anchor included; the pairs below need all six
# (reference rank, target rank) within a group, as in every full CIRR subset (PAPER.md section 2.1)
PAIR_RANKS = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0))


@dataclass(frozen=True)
class Group:
    """Rows of the gallery: the anchor first, then by falling similarity to it."""

    rows: tuple[int, ...]


def walk(vectors: np.ndarray, config: WalkConfig, seed: int) -> Generator[int, None, list[Group]]:
    """Groups of the gallery with unit vectors float32 [n, dim], in the order of a seeded shuffle of the anchors.

    Of two groups that share more than `max_overlap` images the one whose anchor comes first is kept. Yields the number
    of anchors walked from, block by block, and returns the groups.
    """
    candidates: dict[int, Group] = {}
    for anchors, found, scores in Neighbours(vectors).blocks(config.top):
        for anchor, ranking, similarity in zip(anchors.tolist(), found.tolist(), scores.tolist(), strict=True):
            members = _walk_down(ranking, similarity, config)
            if len(members) == GROUP_SIZE - 1:
                candidates[anchor] = Group((anchor, *members))
        yield len(anchors)
    order = np.random.default_rng(seed).permutation(len(vectors)).tolist()
    return without_overlap((candidates[anchor] for anchor in order if anchor in candidates), config.max_overlap)


def _walk_down(ranking: list[int], similarity: list[float], config: WalkConfig) -> list[int]:
    """Take neighbours below `max_similarity`, each at least `spacing` less similar than the one taken before."""
    taken: list[int] = []
    last = np.inf
    for row, score in zip(ranking, similarity, strict=True):
        if row >= 0 and score <= config.max_similarity and last - score >= config.spacing:
            taken.append(row)
            last = score
            if len(taken) == GROUP_SIZE - 1:
                break
    return taken


def without_overlap(groups: Iterable[Group], most: int) -> list[Group]:
    """Of two groups that share more than `most` images the first."""
    kept: list[Group] = []
    member_of: dict[int, list[int]] = defaultdict(list)
    for group in groups:
        shared: dict[int, int] = defaultdict(int)
        for row in group.rows:
            for other in member_of[row]:
                shared[other] += 1
        if max(shared.values(), default=0) <= most:
            for row in group.rows:
                member_of[row].append(len(kept))
            kept.append(group)
    return kept
