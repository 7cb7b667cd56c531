import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from cluster.artifacts import Output
from cluster.driver import lease
from cluster.driver.lease import LEASE, Lease, hold
from cluster.errors import UserError

KILLED = "import os, sys; from cluster.driver import lease; from cluster.artifacts import Output; "
HOLDING = KILLED + "held = lease.hold(Output(sys.argv[1])); held.__enter__(); print(flush=True); sys.stdin.read()"
KILLED += "held = lease.hold(Output(sys.argv[1])); held.__enter__(); os.kill(os.getpid(), 9)"


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path / "out"))


@pytest.fixture
def mine(output: Output) -> Lease:
    """A lease as this process writes it."""
    with hold(output):
        found = lease.read(output)
    assert found is not None
    return found


@pytest.fixture
def elsewhere(mine: Lease) -> Lease:
    """A live lease of a driver on another machine."""
    return replace(mine, owner="other", host="far", pid=12)


def test_a_second_driver_is_refused_and_told_who_is_at_work(output: Output) -> None:
    with hold(output):
        with pytest.raises(UserError, match=rf"out: another driver is at work.*process {os.getpid()} on .*stop it there$"):
            hold(output).__enter__()
        assert lease.read(output) is not None


def test_a_driver_elsewhere_is_believed_until_its_lease_expires(
    output: Output, elsewhere: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.write_json(LEASE, asdict(elsewhere))
    with pytest.raises(UserError, match=r"process 12 on far.*lease ends in"):
        lease.check(output)
    monkeypatch.setattr(lease, "WATCH", 0.1)
    output.write_json(LEASE, asdict(replace(elsewhere, expires=time.time() - 1)))
    with hold(output):
        assert lease.read(output).owner != "other"


@pytest.mark.parametrize("step", [-1e6, -100, 3, 70, 1e6])
def test_a_step_of_the_clock_hands_no_live_lease_over(output: Output, step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", HOLDING, output.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        clock = time.time
        monkeypatch.setattr(time, "time", lambda: clock() + step)
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: clock() + step)  # it counts from the boot's wall clock
        with pytest.raises(UserError, match=f"process {driver.pid} on "):
            lease.check(output)
        driver.kill()
    lease.check(output)


def test_an_expired_lease_that_is_renewed_is_live(output: Output, elsewhere: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine whose clock is an hour behind, or before this one's was set."""
    behind = replace(elsewhere, expires=time.time() - 3600)
    output.write_json(LEASE, asdict(behind))
    renewed = asdict(replace(behind, expires=behind.expires + lease.RENEW_EVERY))
    monkeypatch.setattr(lease.time, "sleep", lambda _: output.write_json(LEASE, renewed))
    with pytest.raises(UserError, match="process 12 on far"):
        hold(output).__enter__()


HOSTILE = '{"owner": "x", "host": "h", "processes": "p", "pid": %s, "started": %s, "expires": 1}'


@pytest.mark.parametrize("name", [LEASE, lease.LOCK])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_a_message(output: Output, name: str, make: Callable[[str], None]) -> None:
    Path(output.uri).mkdir()
    make(output.path(name))
    with pytest.raises(UserError, match=f"{name}: is damaged .it is no file.; bring back"), lease.hold(output):
        pass


@pytest.mark.parametrize(
    "content",
    [
        HOSTILE % (1 << 70, 1),
        HOSTILE % (-1, 1),
        HOSTILE % (1, "1e999"),
        HOSTILE % (1, "NaN"),
        "",
        "[]",
        "{}",
        "null",
        '{"owner": 1}',
        '{"owner": "x", "pid": "y"}',
        "\xff",
    ],
)
def test_what_is_no_lease_is_none(output: Output, content: str) -> None:
    output.write_bytes(LEASE, content.encode("latin-1"))
    assert lease.read(output) is None
    with hold(output):
        assert lease.read(output).pid == os.getpid()


def test_a_driver_that_its_parent_has_not_buried_is_dead(output: Output) -> None:
    driver = subprocess.Popen([sys.executable, "-c", KILLED, output.uri])
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)
    lease.check(output)
    driver.wait()


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit, ValueError, None])
def test_it_is_given_back_however_the_work_ends(output: Output, how: type[BaseException] | None) -> None:
    if how is None:
        with hold(output):
            pass
    else:
        with pytest.raises(how), hold(output):
            raise how
    assert lease.read(output) is None
    lease.check(output)


def test_a_killed_driver_of_this_machine_is_followed_at_once(output: Output) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, output.uri], check=False).returncode == -9
    left = lease.read(output)
    assert left is not None
    assert left.expires > time.time()
    with hold(output):
        assert lease.read(output).pid == os.getpid()


def test_a_later_process_of_the_same_number_is_no_driver(output: Output, mine: Lease) -> None:
    output.write_json(LEASE, asdict(mine))
    with pytest.raises(UserError):
        lease.check(output)
    output.write_json(LEASE, asdict(replace(mine, started=mine.started - 1)))
    lease.check(output)


def test_in_another_container_of_this_machine_a_number_says_nothing(output: Output, mine: Lease) -> None:
    output.write_json(LEASE, asdict(replace(mine, processes="pid:[1]", started=0.0)))
    with pytest.raises(UserError):
        lease.check(output)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_EVERY", 0.01)


def _waiting() -> Iterator[None]:
    for _ in range(3000):
        time.sleep(0.01)
        yield
    raise AssertionError("nothing happened in 30 s")


def test_it_is_renewed_while_the_work_goes_on(output: Output, often: None) -> None:
    with hold(output):
        first = lease.read(output).expires
        for _ in _waiting():
            if lease.read(output).expires > first:
                return


def test_a_driver_that_lost_its_lease_stops(output: Output, elsewhere: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_EVERY", 0.1)  # the rival below writes more often, so a renewal finds its lease

    def work() -> None:
        with hold(output):
            for _ in _waiting():
                output.write_json(LEASE, asdict(elsewhere))

    with pytest.raises(UserError, match="process 12 on far"):
        work()
    assert lease.read(output).owner == "other"


def test_a_lease_is_no_file_of_the_output(output: Output) -> None:
    with hold(output):
        output.write_bytes("part-00000.parquet", b"")
        assert output.names() == ["part-00000.parquet"]
