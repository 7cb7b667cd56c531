"""Calls that another process answers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from fastapi import HTTPException

from cluster.app.serve.apart import Apart


def divider() -> Callable[[int], tuple[float, int]]:
    """What divides one, and says where."""
    return lambda number: (1 / number, os.getpid())


def broken() -> Callable[[int], int]:
    """Nothing."""
    raise ValueError("no weights")


def test_the_answer_and_the_mistake_come_back_from_the_same_other_process() -> None:
    divide: Apart[int, tuple[float, int]] = Apart(divider)
    value, process = divide(2)
    assert (value, process) == (0.5, divide.process.pid)
    with pytest.raises(ZeroDivisionError):
        divide(0)
    assert divide(4) == (0.25, process)


def test_what_cannot_be_made_is_said_by_each_call() -> None:
    call: Apart[int, int] = Apart(broken)
    for _ in range(2):
        with pytest.raises(ValueError, match="no weights"):
            call(1)


def test_a_process_that_ended_is_started_again() -> None:
    divide: Apart[int, tuple[float, int]] = Apart(divider)
    first = divide(1)[1]
    os.kill(first, signal.SIGKILL)
    with pytest.raises(HTTPException) as found:
        divide(1)
    assert (found.value.status_code, found.value.headers) == (503, {"retry-after": "10"})
    assert divide(2)[1] != first


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_ends_with_the_one_that_asks_and_not_at_ctrl_c(sign: signal.Signals) -> None:
    script = (
        "import time; from tests.cluster.app.serve.test_apart import divider; from cluster.app.serve.apart import Apart\n"
        "divide = Apart(divider)\nprint(divide(1)[1], flush=True)\ntime.sleep(60)"
    )
    asking = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert asking.stdout is not None
    other = psutil.Process(int(asking.stdout.readline()))
    other.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert other.is_running()
    asking.send_signal(sign)
    asking.wait(20)
    asking.stdout.close()
    assert psutil.wait_procs([other], timeout=20)[1] == []
