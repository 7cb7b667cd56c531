"""The private memory of this process and of its Ray workers, sampled while something runs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

INTERVAL_S = 0.2
# Ray's own helpers are no workers of ours
WORKERS = {
    "ray::RayTrainWorker": "worker",
    "ray::MapWorker": "actor",
    "ray::Map": "task",
    "ray::IDLE": "task",
    "ray::_": "task",
}
HELPERS = ("Stats", "Autoscal", "Location", "Dashboard")


@contextmanager
def peaks() -> Iterator[dict[str, int]]:
    """Gives the peak bytes of memory of one process of each kind (driver, task, actor), whole at the end.

    Counted is what is a process's own: private anonymous memory. Not what a file or the object store holds, whose pages the
    kernel can drop or share, nor what a fork shares with the process it is a fork of. psutil's `uss` counts mapped files too,
    as long as one process alone maps them.
    """
    found: dict[str, int] = {}
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(found, stop.is_set))
    sampler.start()
    try:
        yield found
    finally:
        stop.set()
        sampler.join()


def _sample(found: dict[str, int], stopped: Callable[[], bool]) -> None:
    own = psutil.Process()
    while not stopped():
        for process in (own, *own.children(recursive=True)):
            try:
                kind = "driver" if process == own else _kind(process)
                if kind:
                    found[kind] = max(found.get(kind, 0), _private(process))
            except (psutil.Error, OSError):  # it ended meanwhile
                continue
        time.sleep(INTERVAL_S)


def _kind(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline())
    if any(helper in title for helper in HELPERS):
        return None
    return next((kind for start, kind in WORKERS.items() if title.startswith(start)), None)


def _private(process: psutil.Process) -> int:
    """Bytes. A page of a map is the process's own or anonymous; both is at most the smaller count."""
    maps = process.memory_maps(grouped=False)
    return sum(min(each.anonymous, each.private_clean + each.private_dirty) for each in maps)
