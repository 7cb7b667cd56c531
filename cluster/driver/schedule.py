"""Doing stages side by side: each in a thread of the driver, as soon as its parents are done and there is room for it."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from itertools import chain

from cluster.driver.demand import resources_of
from cluster.driver.interrupt import interrupt
from cluster.driver.progress import console
from cluster.stage import Stage
from cluster.training.groups import THREAD

LOOK = 0.5  # seconds between looks for a signal, and for a stage that need not wait any longer
GRACE = 15.0  # seconds in which an interrupted stage ends; one that waits in native code ends with the process
Work = tuple[Stage, ...]  # one stage, or several that join the first
Ended = tuple[Work, BaseException | None]
Wait = Callable[[Stage, list[Stage]], bool]  # whether a stage that has room had better wait, beside those that run


class Room:
    """What there is for stages side by side, in Ray's resources, and at most how many of them."""

    def __init__(self, total: Mapping[str, float], most: int | None = None) -> None:
        self.total, self.most = total, most

    def takes(self, stage: Stage, running: list[Stage]) -> bool:
        """Whether a stage fits beside those that run; alone any does, and a stated number of stages is taken at its word."""
        if not running or self.most is not None:
            return len(running) < (self.most or 1)
        wanted = [_wanted(each) for each in (*running, stage)]
        return all(sum(each[name] for each in wanted) <= self.total.get(name, 0.0) + 1e-6 for name in ("CPU", "GPU"))


def _wanted(stage: Stage) -> dict[str, float]:
    resources = resources_of(stage)
    return resources.wanted() if resources else {"CPU": 1.0, "GPU": 0.0}


class Schedule:
    """The stages that a run has yet to do, parents before children."""

    def __init__(self, stages: list[Stage], room: Room, do: Callable[[Work], None]) -> None:
        self.waiting, self.room, self.do = list(stages), room, do
        self.running: dict[Work, threading.Thread] = {}
        self.ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()

    def run(self, first: Callable[[Stage], bool], wait: Wait, started: Callable[[list[Stage], list[Stage]], None]) -> None:
        """Do them all. `first` tells which of those that are ready go first; `started` hears what runs and what waits.

        Those that join a stage that begins begin with it, and take no more room than it does.

        After a failure no other stage starts; when those that run have ended, the first failure is raised. KeyboardInterrupt
        and SystemExit of the main thread, or in a stage, end those that run.
        """
        failure: BaseException | None = None
        try:
            while self.running or (self.waiting and failure is None):
                if failure is None:
                    self._start(first, wait)
                    started(self._leaders(), list(self.waiting))
                try:
                    work, error = self.ended.get(timeout=LOOK)
                except queue.Empty:
                    continue
                self.running.pop(work).join()
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise error
                if error is not None and (self.running or failure is not None):
                    console.print(f"  {', '.join(stage.instance for stage in work)} failed: {error}"[:500])
                failure = failure or error
        except BaseException:
            self._interrupt()
            raise
        if failure is not None:
            raise failure

    def _start(self, first: Callable[[Stage], bool], wait: Wait) -> None:
        pending = {stage.instance for stage in (*self.waiting, *chain(*self.running))}
        ready = [s for s in self.waiting if pending.isdisjoint(parent.instance for parent in s.parents.values())]
        for stage in sorted(ready, key=lambda stage: not first(stage)):
            beside = self._leaders()
            if stage in self.waiting and self.room.takes(stage, beside) and not wait(stage, beside):
                self.waiting.remove(stage)
                work = (stage, *(other for other in ready if other in self.waiting and stage.joins(other)))
                self.waiting = [other for other in self.waiting if other not in work]
                name = f"{THREAD} {stage.instance}"
                self.running[work] = threading.Thread(target=self._work, args=(work,), daemon=True, name=name)
                self.running[work].start()

    def _leaders(self) -> list[Stage]:
        return [work[0] for work in self.running]

    def _work(self, work: Work) -> None:
        error = None
        try:
            self.do(work)
        except BaseException as found:
            error = found
        self.ended.put((work, error))

    def _interrupt(self) -> None:
        signal.alarm(0)  # Ray's handler of SIGTERM lets a process that takes more than 3 s to end abort
        for thread in self.running.values():
            interrupt(thread)
        until = time.monotonic() + GRACE
        for thread in self.running.values():
            thread.join(max(until - time.monotonic(), 0))
