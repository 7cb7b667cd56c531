"""The two processes of a service that load torch: one encodes uploads, the other composes queries and searches with them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from cir.search import Encoder, Hits, Reference, Searcher
from cluster import devices
from cluster.app.serve.apart import Apart
from cluster.app.serve.together import Together
from mining import search
from mining.config import TowerConfig

Took = dict[str, float]  # step -> its seconds


@dataclass(frozen=True)
class OneSearch:
    """What one model is asked."""

    reference: Reference
    text: str
    top: int
    without: int | None  # an image that is no answer


@dataclass(frozen=True)
class Batch:
    """Searches of one model that came at about the same time."""

    model: str
    searches: list[OneSearch]


def finder(searcher: Searcher, models: Sequence[str]) -> Apart[Batch, tuple[list[Hits], Took]]:
    """What finds the answers of each batch, with the batch's steps."""
    return Apart(partial(_find, searcher, models))


def _find(searcher: Searcher, models: Sequence[str]) -> Callable[[Batch], tuple[list[Hits], Took]]:
    _share_cores()
    for name in models:
        searcher.composer(name), searcher.matrix(name)

    def find(batch: Batch) -> tuple[list[Hits], Took]:
        began = time.perf_counter()
        queries = searcher.compose(batch.model, [(one.reference, one.text) for one in batch.searches])
        composed = time.perf_counter()
        tops, without = [one.top for one in batch.searches], [one.without for one in batch.searches]
        found = searcher.matrix(batch.model).nearest_of(queries, tops, without)
        return found, {"compose": composed - began, "search": time.perf_counter() - composed}

    return find


class EncoderApart(Encoder):
    """An encoder in a process of its own, to which images that come at about the same time are one batch."""

    def __init__(self, tower: TowerConfig, worker: Executor) -> None:
        super().__init__(tower)
        encodes: Apart[np.ndarray, np.ndarray] = Apart(partial(_encode, tower))
        self._together: Together[np.ndarray, np.ndarray] = Together(lambda pixels: encodes(np.stack(pixels)), worker)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """As `Encoder.encode`, for many threads."""
        return self._together(pixels)


def _encode(tower: TowerConfig) -> Callable[[np.ndarray], np.ndarray]:
    _share_cores()
    return Encoder(tower).vectors


def _share_cores() -> None:
    """Half of the cores for each: more threads than cores wait for one another at full speed."""
    import torch

    threads = max(1, torch.get_num_threads() // 2)
    devices.limit_threads(threads)
    search.limit_threads(threads)
