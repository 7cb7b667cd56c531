"""Work in a process of its own: neither waits for the other's Python, whatever either does."""

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, Generic, TypeVar

from fastapi import HTTPException

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Apart(Generic[Asked, Answer]):
    """What `make()` returns, made in another process by the first call and called there, one call at a time.

    The process ends with this one, however this one ends. One that ended is started again. It is none of `multiprocessing`,
    whose processes begin by importing what the program imports that starts them.
    """

    def __init__(self, make: Callable[[], Callable[[Asked], Answer]]) -> None:
        """`make` is pickled."""
        self._make, self._lock = make, Lock()
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path})
        theirs.close()
        self._pipe.send(self._make)
        self._end = weakref.finalize(self, _end, self._pipe, self.process)

    def __call__(self, asked: Asked) -> Answer:
        """Raises what `make()` or the call raises; HTTPException 503 where the process ended, for want of memory for one."""
        with self._lock:
            try:
                self._pipe.send(asked)
                failed, answer = self._pipe.recv()
            except (EOFError, OSError):
                self._end()
                self._start()
                raise HTTPException(503, "the models had to be started again; try again", {"retry-after": "10"}) from None
        if failed:
            raise answer
        return answer


def _end(pipe: Connection, process: "subprocess.Popen[bytes]") -> None:
    pipe.close()
    process.wait()


def answer(pipe: Connection) -> None:
    """Call for call, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both: the one that asks decides
    make, call = pipe.recv(), None
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        try:
            call = call or make()
            answered: tuple[bool, Any] = False, call(asked)
        except Exception as error:
            answered = True, error
        pipe.send(answered)


if __name__ == "__main__":
    answer(Connection(int(sys.argv[1])))
