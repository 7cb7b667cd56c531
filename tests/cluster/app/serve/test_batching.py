"""Calls of many threads as batches."""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from threading import Event

import pytest

from cluster.app.serve.batching import MOST, Batching


@pytest.fixture
def worker() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as worker:
        yield worker


def test_what_comes_while_a_batch_is_at_work_is_the_next_one(worker: Executor) -> None:
    batches: list[list[int]] = []
    begun, go_on = Event(), Event()

    def work(asked: list[int]) -> list[int]:
        batches.append(asked)
        begun.set()
        assert go_on.wait(10)
        return [2 * one for one in asked]

    batching = Batching(work, worker)
    with ThreadPoolExecutor(MOST + 9) as pool:
        first = pool.submit(batching, 0)
        assert begun.wait(10)
        others = [pool.submit(batching, n) for n in range(1, MOST + 9)]
        while len(batching._waiting) < MOST + 8:
            pass
        go_on.set()
        assert [future.result(10) for future in (first, *others)] == [2 * n for n in range(MOST + 9)]
    assert [len(batch) for batch in batches] == [1, MOST, 8]


def test_a_mistake_is_that_of_the_one_who_made_it(worker: Executor) -> None:
    def work(asked: list[int]) -> list[float]:
        return [1 / one for one in asked]

    batching = Batching(work, worker)
    busy = Event()
    worker.submit(busy.wait, 10)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(batching, n) for n in (1, 0, 2)]
        while len(batching._waiting) < 3:
            pass
        busy.set()
        assert (futures[0].result(10), futures[2].result(10)) == (1, 0.5)
        with pytest.raises(ZeroDivisionError):
            futures[1].result(10)
