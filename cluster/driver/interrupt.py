"""Ctrl-C for one thread, and for a process that is told to end."""

import ctypes
import signal
import threading
from typing import NoReturn

ENDS = (signal.SIGTERM, signal.SIGHUP)  # of a cluster or a service manager; of a terminal that closes


def interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in a thread, when it next runs Python."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))


def end_as_ctrl_c() -> None:
    """Make what ends this process do what Ctrl-C does; what is ignored, as under `nohup`, stays so.

    Once more after Ray has started, which puts handlers of its own in place.
    """
    if threading.current_thread() is threading.main_thread():
        for number in ENDS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupted)


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt
