"""Work in a process of its own: neither waits for the other's Python, whatever either does."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Lock
from typing import Generic, TypeVar

from cluster.ending import end_at_once

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
PATIENCE = 1.0  # seconds


class Ended(Exception):
    """A child process ended in a call, for want of memory for one."""


class ChildProcess(Generic[Asked, Answer]):
    """What `make()` returns, made in another process by the first call and called there, one call at a time.

    The process is started by the first call, and again by the first after it has ended. It ends with this one, however this
    one ends. It is none of `multiprocessing`, whose processes begin by importing what the program imports that starts them.
    """

    def __init__(self, make: Callable[[], Callable[[Asked], Answer]]) -> None:
        """`make` is pickled."""
        self._make, self._lock = make, Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, asked: Asked) -> Answer:
        """Raises what `make()` or the call raises, and Ended."""
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            try:
                self._pipe.send(asked)
                failed, answer = self._pipe.recv()
            except BaseException as error:  # the next call would get the answer to this one
                status = self._end()
                if isinstance(error, EOFError | OSError):
                    logging.getLogger(__name__).warning("the process of %s ended with status %s", self._make, status)
                    raise Ended(f"the process at work ended (status {status}): was there too little memory?") from None
                raise
        if failed:
            raise answer
        return answer

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())]
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        environment = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, start_new_session=True)
        self._end = weakref.finalize(self, _end, self._pipe, self.process)
        theirs.close()
        self._pipe.send(self._make)


def _end(pipe: Connection, process: "subprocess.Popen[bytes]") -> int:
    """It has nothing to keep: one that is idle leaves at once, one that is busy is not waited for."""
    pipe.close()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _serve(pipe: Connection) -> None:
    """Call for call, until nobody can ask any more. Signals are for the process that asks: it decides."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)
    make, call = pipe.recv(), None
    while True:
        asked = pipe.recv()
        try:
            call = call or make()
            told = pickle.dumps((False, call(asked)))
        except Exception as error:
            error.add_note(traceback.format_exc())
            told = pickle.dumps((True, _travels(error)))
        pipe.send_bytes(told)


def _travels(error: Exception) -> Exception:
    """The error, or one that says the same, where it does not come out of a pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("\n".join([repr(error), *error.__notes__]))
    return error


def main() -> None:
    """What the first argument's pipe asks for."""
    with suppress(EOFError, OSError):
        _serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    end_at_once(main)
