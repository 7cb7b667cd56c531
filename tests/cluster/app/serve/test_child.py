"""Calls that another process answers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import psutil
import pytest

from cluster.app.serve.child import ChildProcess, Ended


class TwoArguments(Exception):
    """Comes out of no pickle."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")


def divider() -> Callable[[int], tuple[float, int]]:
    """What divides one, and says where."""
    return lambda number: (1 / number, os.getpid())


def broken() -> Callable[[int], int]:
    """Nothing."""
    raise ValueError("no weights")


def odd() -> Callable[[str], object]:
    """What answers with what no pickle holds, or raises it."""

    def answer(asked: str) -> object:
        if asked == "lambda":
            return lambda: None
        raise TwoArguments("truncated", "cut")

    return answer


def sleeper() -> Callable[[float], None]:
    """What takes its time."""
    return time.sleep


def test_the_answer_and_the_mistake_come_back_from_the_same_other_process() -> None:
    divide: ChildProcess[int, tuple[float, int]] = ChildProcess(divider)
    value, process = divide(2)
    assert value == 0.5
    assert process not in (0, os.getpid())
    with pytest.raises(ZeroDivisionError) as found:
        divide(0)
    assert "test_child.py" in found.value.__notes__[0]
    assert divide(4) == (0.25, process)


def test_what_cannot_be_made_is_said_by_each_call() -> None:
    call: ChildProcess[int, int] = ChildProcess(broken)
    for _ in range(2):
        with pytest.raises(ValueError, match="no weights"):
            call(1)


def test_what_does_not_travel_is_said() -> None:
    call: ChildProcess[str, object] = ChildProcess(odd)
    with pytest.raises(Exception, match="lambda"):
        call("lambda")
    with pytest.raises(Exception, match="truncated"):
        call("raise")


def test_a_process_that_ended_is_started_again() -> None:
    divide: ChildProcess[int, tuple[float, int]] = ChildProcess(divider)
    first = divide(1)[1]
    sleep: ChildProcess[float, None] = ChildProcess(sleeper)
    sleep(0)
    assert sleep.process is not None
    Thread(target=lambda: (time.sleep(0.2), sleep.process.kill())).start()  # type: ignore[union-attr]
    with pytest.raises(Ended, match=r"status -9"):
        sleep(60)
    sleep(0)
    os.kill(first, signal.SIGKILL)
    psutil.Process(first).wait(10)
    assert divide(2)[1] != first


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secrets.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    divide: ChildProcess[int, tuple[float, int]] = ChildProcess(divider)
    assert divide(1)[0] == 1


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_the_one_that_asks_and_not_by_itself(sign: signal.Signals, busy: bool) -> None:
    script = (
        "import sys, time; sys.path.append(sys.argv[1])\n"
        "from tests.cluster.app.serve.test_child import sleeper; from cluster.app.serve.child import ChildProcess\n"
        "sleep = ChildProcess(sleeper); sleep(0); print(sleep.process.pid, flush=True)\n"
        f"sleep({1 if busy else 0}); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[4])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        other = psutil.Process(int(asking.stdout.readline()))
        for ignored in (signal.SIGINT, signal.SIGTERM):
            other.send_signal(ignored)
        time.sleep(0.1)
        assert other.status() != psutil.STATUS_ZOMBIE
        asking.send_signal(sign)
        asking.wait(20)
        assert psutil.wait_procs([other], timeout=20)[1] == []
