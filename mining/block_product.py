"""Exact neighbours by torch, on a GPU: products in half precision, candidates to spare, scored again in fp32.

Half precision is fp16: as fast as bf16 on a GPU, and of numbers between -1 and 1 eight times as exact.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mining.search import TopK

SHARD_ROWS = 2**18  # vectors that a block of queries meets at a time
QUERIES = 1024  # of a block that are multiplied at a time
SPARE = 32  # candidates beyond those asked for
# Of unit vectors rounded to fp16 the product is wrong by 2^-10 at most, and its own rounding by 2^-12; twice that, for sums
# that a GPU may round on the way.
ERROR = 2**-9
KEPT_SHARE = 0.6  # of the GPU's free memory that may hold shards between blocks


class BlockProduct:
    """A `Search`: every vector is compared. Where rounding could have hidden a neighbour, the row is compared again in fp32.

    As many shards as fit stay on the device; the others come anew for each block of queries.
    """

    def __init__(self, vectors: np.ndarray, device: str) -> None:
        self.vectors, self.device = vectors, device
        self._kept: dict[int, Tensor] = {}

    def __call__(self, queries: np.ndarray, count: int) -> TopK:
        """As `Search`."""
        moved = self._moved(queries)
        found = torch.full((len(queries), count), -1, device=self.device)
        scores = torch.full((len(queries), count), -torch.inf, device=self.device)
        for first, shard in self._shards():
            half = shard.half()
            for start in range(0, len(queries), QUERIES):
                here = slice(start, start + QUERIES)
                found[here], scores[here] = _nearer(moved[here], shard, half, first, found[here], scores[here])
        return found.cpu().numpy(), scores.cpu().numpy()

    def _shards(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(self.vectors), SHARD_ROWS):
            if (shard := self._kept.get(first)) is None:
                shard = self._moved(self.vectors[first : first + SHARD_ROWS])
                if len(self._kept) < self._most_kept:
                    self._kept[first] = shard
            yield first, shard

    def _moved(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(values)).to(self.device)  # a copy: torch takes no array that must not be written

    @cached_property
    def _most_kept(self) -> int:
        if self.device == "cpu":
            return 0
        return int(KEPT_SHARE * torch.cuda.mem_get_info()[0]) // (SHARD_ROWS * self.vectors.shape[1] * 4)


def _nearer(queries: Tensor, shard: Tensor, half: Tensor, first: int, found: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [q, k] and cosines [q, k] of the best of those found so far and of a shard, whose first row is `first`."""
    count = min(scores.shape[1] + SPARE, len(shard))
    rough, candidates = (queries.half() @ half.T).topk(count)
    exact = torch.bmm(shard[candidates], queries[:, :, None])[:, :, 0]
    found, scores, before = *_best(found, scores, candidates + first, exact), (found, scores)
    if count < len(shard):
        unsure = (rough[:, -1].float() + ERROR > scores[:, -1]).nonzero()[:, 0]
        if len(unsure):
            exact, candidates = (queries[unsure] @ shard.T).topk(min(scores.shape[1], len(shard)))
            found[unsure], scores[unsure] = _best(before[0][unsure], before[1][unsure], candidates + first, exact)
    return found, scores


def _best(found: Tensor, scores: Tensor, candidates: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """The best of both, as many as have been found."""
    best, order = torch.cat([scores, exact], dim=1).topk(scores.shape[1])
    return torch.cat([found, candidates], dim=1).gather(1, order), best
