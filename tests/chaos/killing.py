"""Kill -9 of Ray's processes below a driver, and tables that must come out the same all the same."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pyarrow as pa

from cluster.artifacts import Output
from mining.embeddings import read_part

POLL = 0.005


def find(driver: int, name: str) -> list[psutil.Process]:
    """Processes below a driver that show `name`: a program, or an actor's class as `ray::MapWorker(MapBatches(Embedder))`."""
    try:
        below = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in below if name in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return next(iter(process.cmdline()), "")
    except psutil.NoSuchProcess:  # a zombie too
        return ""


def kill_when(
    victims: Callable[[], list[psutil.Process]],
    ready: Callable[[], bool],
    going: Callable[[], bool],
    number: int = signal.SIGKILL,
) -> bool:
    """Signal the first victim as soon as there is one and it is time. False when the work ended before that."""
    found: list[psutil.Process] = []
    while going():
        found = [victim for victim in found if _alive(victim)] or victims()
        if found and ready():
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile: the next one
                found[0].send_signal(number)
                return True
        time.sleep(POLL)
    return False


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def killing(name: str, ready: Callable[[], bool]) -> Iterator[None]:
    """Kill a process of this driver's Ray that shows `name` while the block runs. AssertionError when the block ended first."""
    ended, killed = threading.Event(), []
    before = find(os.getpid(), name)  # actors of an earlier stage that are still going down

    def victims() -> list[psutil.Process]:
        return [process for process in find(os.getpid(), name) if process not in before]

    thread = threading.Thread(target=lambda: killed.append(kill_when(victims, ready, lambda: not ended.is_set())))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert killed == [True], f"the work ended before {name} was killed"


def assert_same_embeddings(found: Output, expected: Output) -> None:
    """The same ids in the same parts, every value within one unit of float16, no id twice."""
    assert found.parts() == expected.parts()
    for part in expected.parts():
        (ids, values), (expected_ids, expected_values) = read_part(found, part), read_part(expected, part)
        assert np.array_equal(ids, expected_ids)
        assert len(set(ids.tolist())) == len(ids)
        assert np.abs(_ordered(values) - _ordered(expected_values)).max(initial=0) <= 1


def _ordered(values: np.ndarray) -> np.ndarray:
    """float16 as integers of which neighbouring numbers differ by one."""
    bits = values.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_same_table(found: Output, expected: Output, schema: pa.Schema, key: str) -> None:
    """The same parts with the same rows, no key twice."""
    assert found.parts() == expected.parts()
    table = found.read_parts(schema)
    assert table.equals(expected.read_parts(schema))
    assert len(set(table[key].to_pylist())) == len(table) > 0
