"""Ctrl-C for one thread, and for a process that is told to end."""

import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

ENDS = (signal.SIGTERM, signal.SIGHUP)  # of a cluster or a service manager; of a terminal that closes
SAME = 20.0  # seconds in which further ones mean the first: a terminal and its shell both send theirs
_whole: WeakKeyDictionary[threading.Thread, threading.RLock] = WeakKeyDictionary()  # held in blocks that are not cut off


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A short block of a thread that `interrupt` waits for, such as a write that would leave a database locked."""
    with _whole.setdefault(threading.current_thread(), threading.RLock()):
        yield


def interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in a thread, when it next runs Python."""
    assert thread.ident is not None
    block = _whole.setdefault(thread, threading.RLock())
    ended = block.acquire(timeout=SAME)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    if ended:
        block.release()


def end_as_ctrl_c() -> None:
    """Make what ends this process do what Ctrl-C does; what is ignored, as under `nohup`, stays so.

    Once more after Ray has started, which puts handlers of its own in place.
    """
    heard = -SAME

    def interrupted(*_: object) -> None:
        """The run's end is not cut off by a second one."""
        nonlocal heard
        if time.monotonic() - heard > SAME:
            heard = time.monotonic()
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in ENDS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, interrupted)
