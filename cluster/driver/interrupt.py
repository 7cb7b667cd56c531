"""Ctrl-C for one thread."""

import ctypes
import threading


def interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in a thread, when it next runs Python."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
