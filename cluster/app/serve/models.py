"""The two processes of a service that load torch: one encodes uploads, the other composes queries and searches with them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from cir.search import Encoder, Hits, Reference, Searcher
from cluster.app.serve.batching import Batching
from cluster.app.serve.child import ChildProcess
from cluster.devices import limit_threads
from mining.config import TowerConfig
from mining.search import limit_faiss_threads

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


def finder(searcher: Searcher, models: Sequence[str]) -> ChildProcess[Batch, tuple[list[Hits], Took]]:
    """What finds the answers of each batch, with the batch's steps."""
    return ChildProcess(partial(_find, searcher, models))


def _find(searcher: Searcher, models: Sequence[str]) -> Callable[[Batch], tuple[list[Hits], Took]]:
    threads = _half_of_the_cores()
    limit_threads(threads)
    limit_faiss_threads(threads)
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


class EncoderProcess(Encoder):
    """An encoder in a process of its own, to which images that come at about the same time are one batch."""

    def __init__(self, tower: TowerConfig, thread: Executor) -> None:
        super().__init__(tower)
        encodes: ChildProcess[np.ndarray, np.ndarray] = ChildProcess(partial(_encode, tower))
        self._batching: Batching[np.ndarray, np.ndarray] = Batching(lambda pixels: encodes(np.stack(pixels)), thread)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """As `Encoder.encode`, for many threads."""
        return self._batching(pixels)


def _encode(tower: TowerConfig) -> Callable[[np.ndarray], np.ndarray]:
    limit_threads(_half_of_the_cores())
    return Encoder(tower).vectors


def _half_of_the_cores() -> int:
    """More threads than cores wait for one another at full speed."""
    import torch

    return max(1, torch.get_num_threads() // 2)
