"""Training on all cores beside a process that keeps one of them busy: the speed that is left, and what the setting costs.

The steps are of instruction, SmolLM2-135M on the grocery's deltas, in a process with the workers' environment and in one
without its OpenMP setting. They take turns, with and without the busy process, and begin the rounds in turn: who
comes after the other has cold caches.
"""

import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection

from cluster.driver.session import OPENMP, WORKER_ENVIRONMENT

ROUNDS = 10


def steps(pipe: Connection) -> None:
    """Do one step for each message; answer with its seconds."""
    from bench_instruct import make_task, our_steps

    from cluster.training import engine

    with tempfile.TemporaryDirectory() as folder, engine.process_group(), ThreadPoolExecutor(1) as prefetcher:
        steps = our_steps(make_task(folder), prefetcher)
        next(steps)
        pipe.send(0.0)
        while pipe.recv():
            began = time.perf_counter()
            next(steps)
            pipe.send(time.perf_counter() - began)


def busy() -> None:
    """Keep a core busy."""
    while True:
        pass


@contextmanager
def training(environment: dict[str, str]) -> Iterator[Connection]:
    """A training process with this environment."""
    before = dict(os.environ)
    os.environ.update(environment)
    ours, its = mp.Pipe()
    process = mp.get_context("spawn").Process(target=steps, args=(its,))
    process.start()
    os.environ.clear()
    os.environ.update(before)
    ours.recv()
    try:
        yield ours
    finally:
        ours.send(False)
        process.join()


def step(pipe: Connection) -> float:
    """Seconds of a step."""
    pipe.send(True)
    return float(pipe.recv())


def beside_busy(pipe: Connection) -> float:
    """Seconds of a step beside a busy process."""
    process = mp.get_context("fork").Process(target=busy)
    process.start()
    try:
        return step(pipe)
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Print the two ratios."""
    without = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in OPENMP}
    with training(WORKER_ENVIRONMENT) as ours, training(without) as other:
        ways = [("idle", step, ours), ("plain", step, other), ("busy", beside_busy, ours), ("plain, busy", beside_busy, other)]
        orders = ways, [ways[place] for place in (1, 0, 3, 2)]
        rounds = [{name: way(pipe) for name, way, pipe in orders[turn % 2]} for turn in range(ROUNDS)]
    seconds = {name: statistics.median(each[name] for each in rounds) for name, *_ in ways}
    print(
        f"training beside a busy process / idle ({seconds['idle']:.2f} s a step): {seconds['idle'] / seconds['busy']:.2f} "
        f"(goal >= 0.4; without the setting {seconds['plain'] / seconds['plain, busy']:.2f})"
    )
    print(f"idle training with the setting / without: {seconds['plain'] / seconds['idle']:.2f} (goal >= 0.97)")


if __name__ == "__main__":
    main()
