"""The end of a program without Python's last part of it, a look at every object of every library: seconds, if they are many."""

import atexit
import os
import sys
import threading
from collections.abc import Callable


def end_at_once(program: Callable[[], object]) -> None:
    """Run a program. When it ends, and not by an exception, its threads are waited for, `atexit` is served, and that is all."""
    try:
        program()
        status = 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):  # a message
            raise
        status = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
