"""Two ways of doing one thing, timed in turns in one process, so that the machine's other load hits both."""

import statistics
import time
from collections.abc import Callable

THREADS = 1  # of torch: two that wait for each other crawl, unevenly, on a machine that others use too


def interleaved(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of each over `rounds` turns, after one turn of each that is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for way, times in zip((ours, other), seconds, strict=True):
            began = time.perf_counter()
            way()
            if turn:
                times.append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
