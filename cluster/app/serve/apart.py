"""Work in a process of its own: neither waits for the other's Python, whatever either does."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, Generic, TypeVar

from fastapi import HTTPException

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Apart(Generic[Asked, Answer]):
    """What `make()` returns, made in another process by the first call and called there, one call at a time.

    The process ends with this one, however this one ends. One that ended is started again.
    """

    def __init__(self, make: Callable[[], Callable[[Asked], Answer]]) -> None:
        """`make` is pickled."""
        self._make, self._lock = make, Lock()
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # what a fork would share with threads of this process is unsafe
        self._pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_answer, args=(self._make, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, asked: Asked) -> Answer:
        """Raises what `make()` or the call raises; HTTPException 503 where the process ended, for want of memory for one."""
        with self._lock:
            try:
                self._pipe.send(asked)
                failed, answer = self._pipe.recv()
            except (EOFError, OSError):
                self._pipe.close()
                self._start()
                raise HTTPException(503, "the models had to be started again; try again", {"retry-after": "10"}) from None
        if failed:
            raise answer
        return answer


def _answer(make: Callable[[], Callable[[Any], Any]], pipe: Connection) -> None:
    """Call for call, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both: the one that asks decides
    call: Callable[[Any], Any] | None = None
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        try:
            call = call or make()
            answered = False, call(asked)
        except Exception as error:
            answered = True, error
        pipe.send(answered)
