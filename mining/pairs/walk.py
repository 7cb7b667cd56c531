"""The paper's pairs: a walk down each anchor's ranking gives groups of six, and each group nine ordered pairs.

A group is a row int [6] of a numpy array, rows of the gallery: the anchor first, then by falling similarity to it.
"""

from array import array
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from mining import tables
from mining.config import WalkConfig
from mining.features import ORIGIN
from mining.neighbours import Nearest
from mining.pairs.job import Mining, pairs_table, write_parts
from mining.pairs.similarities import cosines

GROUP_SIZE = 6  # images of a group, the anchor included; its nine pairs need all six
# (reference rank, target rank) within a group of six, as in every full CIRR subset (the paper's section 3.2)
PAIR_RANKS = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0))
_RANKS = np.array(PAIR_RANKS)


def write_walked(job: Mining) -> Iterator[int]:
    """Groups of all anchors, then their pairs. Yields the number of anchors walked from, block by block."""
    nearest, groups = job.nearest(), []
    for block in nearest.blocks():
        groups.append(groups_of(nearest, block, job.config.walk))
        yield block.stop - block.start
    ids, vectors = job.vectors(ORIGIN)
    kept = without_overlap(shuffled(np.concatenate(groups), len(ids), job.seed), len(ids), job.config.walk)
    write_grouped(job, ids, vectors, kept, *pairs_of(kept, len(ids)))


def groups_of(nearest: Nearest, block: slice, config: WalkConfig) -> np.ndarray:
    """Groups int32 [m, 6] of one block of anchors, at most one an anchor."""
    rankings = zip(nearest.rows[block].tolist(), nearest.cosines[block].tolist(), strict=True)
    groups = [
        (anchor, *members)
        for anchor, (ranking, similarity) in enumerate(rankings, block.start)
        if len(members := _walk_down(ranking, similarity, config)) == GROUP_SIZE - 1
    ]
    return np.array(groups, np.int32).reshape(-1, GROUP_SIZE)


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


def shuffled(groups: np.ndarray, images: int, seed: int) -> np.ndarray:
    """Groups in the order of a seeded shuffle of the gallery's images, their anchors."""
    place = np.empty(images, np.int64)
    place[np.random.default_rng(seed).permutation(images)] = np.arange(images)
    return groups[np.argsort(place[groups[:, 0]])]


def without_overlap(groups: np.ndarray, images: int, config: WalkConfig) -> np.ndarray:
    """The groups kept, first come first kept.

    One is dropped that shares more than `max_overlap` images with a kept one, or has an image that is in `max_slots` kept
    ones: a group is compared with six times as many at most. The kept groups of each image are linked lists in flat
    arrays: 4 bytes an image and 24 a group.
    """
    newest = array("i", [-1]) * images  # of each image the last of its slots; slot 6 g + r is rank r of group g
    older = array("i", [-1]) * groups.size
    slots = array("i", [0]) * images
    kept = np.zeros(len(groups), bool)
    for place, rows in enumerate(map(np.ndarray.tolist, groups)):
        if any(slots[row] >= config.max_slots for row in rows) or _overlap(rows, newest, older) > config.max_overlap:
            continue
        kept[place] = True
        for rank, row in enumerate(rows):
            slot = place * GROUP_SIZE + rank
            older[slot], newest[row] = newest[row], slot
            slots[row] += 1
    return groups[kept]


def _overlap(rows: list[int], newest: array, older: array) -> int:
    """Most images that one kept group shares with these."""
    shared: dict[int, int] = {}
    for row in rows:
        slot = newest[row]
        while slot >= 0:
            group = slot // GROUP_SIZE
            shared[group] = shared.get(group, 0) + 1
            slot = older[slot]
    return max(shared.values(), default=0)


def pairs_of(groups: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """(group [m], place in PAIR_RANKS [m]) of the ordered pairs, nine a group, each pair in the first group that has it."""
    ordered = groups[:, np.array(PAIR_RANKS)].astype(np.int64)
    first = np.unique(ordered[..., 0].ravel() * images + ordered[..., 1].ravel(), return_index=True)[1]
    first.sort()
    return first // len(PAIR_RANKS), first % len(PAIR_RANKS)


def write_grouped(
    job: Mining, ids: np.ndarray, vectors: np.ndarray, groups: np.ndarray, group: np.ndarray, place: np.ndarray
) -> None:
    """Write the pairs at some places of some groups."""

    def part(here: slice) -> pa.Table:
        references, targets = members(groups, group[here], place[here])
        group_ids = [tables.stable_id("group", *images) for images in ids[groups[group[here]]].tolist()]
        columns = {"group_id": group_ids, "reference_rank": _RANKS[place[here], 0], "target_rank": _RANKS[place[here], 1]}
        return pairs_table(ids, references, targets, cosines(vectors, references, targets), columns)

    write_parts(job, len(group), part)


def members(groups: np.ndarray, group: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the references and targets at some places of some groups."""
    return groups[group, _RANKS[place, 0]], groups[group, _RANKS[place, 1]]
