"""The anonymous memory of this process and of its Ray workers, sampled while something runs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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

    Counted is anonymous memory (`Anonymous` of Linux's smaps_rollup): what no file holds, nor the object store, whose pages
    the kernel can drop or share; of a fork also what it shares with the process it is a fork of. psutil's `uss` counts mapped
    files too, as long as one process alone maps them.
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
                    found[kind] = max(found.get(kind, 0), _anonymous(process.pid))
            except (psutil.Error, OSError):  # it ended meanwhile
                continue
        time.sleep(INTERVAL_S)


def _kind(process: psutil.Process) -> str | None:
    title = " ".join(process.cmdline())
    if any(helper in title for helper in HELPERS):
        return None
    return next((kind for start, kind in WORKERS.items() if title.startswith(start)), None)


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
