"""Outputs, leases and checkpoints on an S3-compatible store, as in a local folder."""

import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from cluster.app import config as configs
from cluster.app.graph import Graph
from cluster.app.outputs import outputs, remove
from cluster.artifacts import Output
from cluster.driver import lease
from cluster.errors import UserError
from cluster.training.checkpoints import latest
from tests.chaos.conftest import LIMIT, assert_same, start
from tests.chaos.killing import kill_when
from tests.s3 import bucket

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The root of an S3-compatible store on loopback."""
    with bucket() as root:
        yield root


def test_a_run_killed_in_training_goes_on_from_its_checkpoint(
    store: str, config: str, undisturbed: Path, tmp_path: Path
) -> None:
    log, tracking = tmp_path / "log", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    graph, expected = (Graph(configs.load(config, [f"root={root}"])) for root in (store, undisturbed))
    output = graph.output(graph["instruct:vdg"])

    def has_checkpoint() -> bool:
        return latest(output) is not None

    driver = start(config, store, log, tracking)
    assert kill_when(lambda: [psutil.Process(driver.pid)], has_checkpoint, lambda: driver.poll() is None), log.read_text()
    assert driver.wait(LIMIT) == -signal.SIGKILL
    assert start(config, store, log, tracking).wait(LIMIT) == 0, log.read_text()
    assert_same(graph, expected)
    assert all(found.finished for found in outputs(store))
    assert start(config, store, log, tracking).wait(LIMIT) == 0
    assert "0 of" in log.read_text().splitlines()[-1]
    remove(list(outputs(store)))
    assert not list(outputs(store))


def test_the_last_of_two_drivers_to_write_its_lease_goes_on(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(store.replace("root?", "leased?"))
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    with lease.hold(output):
        mine = lease.read(output)
        assert mine is not None
        with pytest.raises(UserError, match="another driver is at work"):
            lease.hold(output).__enter__()
    assert lease.read(output) is None
    rival = replace(mine, owner="other", host="far")
    monkeypatch.setattr(lease.time, "sleep", lambda _: output.write_json(lease.LEASE, asdict(rival)))
    with pytest.raises(UserError, match="on far"):
        lease.hold(output).__enter__()
    assert lease.read(output) == rival
