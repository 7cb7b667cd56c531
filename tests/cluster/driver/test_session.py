"""A session that does not begin is one message, whatever Ray says; what its workers are given keeps their memory."""

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.driver import session
from cluster.driver.session import RayConfig
from cluster.errors import UserError


def begin(config: RayConfig) -> str:
    with pytest.raises(UserError) as error:
        session._connect(config)
    return str(error.value)


def test_a_head_that_takes_connections_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "PATIENCE", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert f"no Ray cluster takes us at {address}: no answer in 2 s" in begin(RayConfig(address=address))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "ray://127.0.0.1:9"])
def test_an_address_where_nobody_is(address: str) -> None:
    message = begin(RayConfig(address=address))
    assert message.startswith(f"resources.ray.address: no Ray cluster takes us at {address}: ")
    assert message.count("\n") == 1


def test_a_full_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would start workers that end, without end."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(session, "ROOM", 1 << 60)
    message = begin(RayConfig())
    assert message.startswith(f"Ray does not start here: {tmp_path} has ")
    assert message.endswith("; make room, or give another folder as RAY_TMPDIR or TMPDIR")


def test_a_local_ray_that_does_not_start_is_one_message(tmp_path: Path) -> None:
    """In a process of its own: a session of these tests is running."""
    place = tmp_path / ("long" * 30)
    place.mkdir()
    script = "from cluster.driver.session import *; start(RayConfig(num_cpus=1))"
    environment = {**os.environ, "RAY_TMPDIR": str(place), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stderr.splitlines()[-1].startswith("cluster.errors.UserError: Ray does not start here: ")
    assert "RAY_TMPDIR=/tmp" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("trace\n\nTimeoutError: start-up took too long\n", "TimeoutError: start-up took too long; `vdg doctor` looks at disk"),
        ("AF_UNIX path length cannot exceed 107 bytes: '/x'", "such as RAY_TMPDIR=/tmp"),
        ("", "Ray does not start here: ;"),
    ],
)
def test_what_ray_says_last_is_said_with_what_to_do(said: str, expected: str) -> None:
    assert expected in session._refused("local", said)


STOPPED = """
import sys
import threading
from pathlib import Path
from cluster.app import cli
from cluster.driver import session
from cluster.errors import UserError

def waits_for_workers_and_lets_them_go():
    import ray
    mailbox = ray.remote(Mailbox).options(num_cpus=0).remote()
    try:
        ray.get(mailbox.wait.remote())
    finally:
        ray.kill(mailbox)

class Mailbox:
    def wait(self):
        threading.Event().wait()

def more_workers_than_ray_expects():
    import ray
    mailboxes = [ray.remote(Mailbox).options(num_cpus=0).remote() for _ in range(12)]
    ray.get([mailbox.__ray_ready__.remote() for mailbox in mailboxes])

def command():
    session.start(session.RayConfig(num_cpus=1), Path(sys.argv[1]))
    more_workers_than_ray_expects()
    import ray
    ray.data.range(3).materialize()
    thread = threading.Thread(target=waits_for_workers_and_lets_them_go, daemon=True, name="vdg stage")
    thread.start()
    thread.join(3)
    raise UserError("stopped")

cli.app = command
cli.program()
"""


def test_a_thread_that_calls_ray_after_its_end_changes_no_status_and_the_terminal_is_quiet(tmp_path: Path) -> None:
    """Ray ends the whole process then, with status 1, or starts anew; its lines are in the log."""
    log = tmp_path / "log.txt"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", STOPPED, str(log)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "error: stopped\n")
    assert "execution finished" in log.read_text()


AGAIN = """
import resource, threading

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b'1' * (100 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=lambda: print(faults(), faults()))
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_a_thread_of_a_worker_keeps_the_memory_of_a_large_activation() -> None:
    environment = {**os.environ, **session.WORKER_ENVIRONMENT}
    ran = subprocess.run([sys.executable, "-c", AGAIN], env=environment, capture_output=True, text=True, check=True)
    first, again = map(int, ran.stdout.split())
    assert first > 10_000
    assert again < 100
