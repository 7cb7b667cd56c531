"""Programs that end without a look at what they have loaded."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from cluster.ending import end_at_once

class Told:
    def __del__(self):
        print("finalized", flush=True)

def program():
    sys.modules["kept"] = Told()
    atexit.register(print, "served")
    threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
    {last}

end_at_once(program)
"""


@pytest.mark.parametrize(("last", "status"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit(False)", 0)])
def test_threads_and_what_is_registered_come_before_the_end(last: str, status: int) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(last=last)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split("\n"), ended.stderr) == (status, ["waited for", "served", ""], "")


@pytest.mark.parametrize(("last", "said"), [("sys.exit('no')", "no\n"), ("1 / 0", "ZeroDivisionError: division by zero\n")])
def test_what_goes_wrong_is_said_as_ever(last: str, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(last=last)], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith(said)
    assert "served" in ended.stdout
