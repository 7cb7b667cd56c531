"""Checks of a machine: what blocks, what warns, and that each problem says what to do."""

import socket
from pathlib import Path
from threading import Thread

import pytest

from cluster.driver import doctor


@pytest.fixture
def closed_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_this_machine_has_no_blocker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    findings = doctor.examine(str(tmp_path / "root"), f"sqlite:///{tmp_path}/mlflow.db")
    assert [f for f in findings if f.state == "blocker"] == []
    assert all(f.advice for f in findings if f.state == "warning")
    assert "torch " in next(f.found for f in findings if f.subject == "packages")
    assert not (tmp_path / "root").exists()


def test_a_version_outside_the_bounds_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "no-such-package>=1", 'unused>=1; extra == "gpu"'])
    finding = doctor.packages()
    assert finding.state == "blocker"
    assert "needs >=99" in finding.found
    assert "no-such-package missing" in finding.found
    assert "unused" not in finding.found


def test_what_does_not_answer_blocks(closed_port: int) -> None:
    mlflow = doctor.mlflow_store(f"http://127.0.0.1:{closed_port}")
    ray = doctor.ray_cluster(f"127.0.0.1:{closed_port}")
    assert (mlflow.state, ray.state) == ("blocker", "blocker")
    assert "mlflow server" in mlflow.advice
    assert "resources.ray.address" in ray.advice


def test_a_server_that_is_not_mlflow_blocks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0-OpenSSH\r\n"))
        answer.start()
        finding = doctor.mlflow_store(f"http://127.0.0.1:{server.getsockname()[1]}")
        answer.join()
    assert finding.state == "blocker"
    assert "BadStatusLine" in finding.found


def test_passwords_are_not_printed(closed_port: int) -> None:
    for finding in (
        doctor.mlflow_store(f"http://someone:hidden@127.0.0.1:{closed_port}"),
        doctor.disk("nosuchstore://someone:hidden@bucket/root"),
    ):
        assert finding.state == "blocker"
        assert "hidden" not in finding.found


def test_a_ray_of_ones_own_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert doctor.ray_cluster("local").state == "ok"
    assert doctor.ray_token("local").state == "ok"


def test_an_address_without_a_port_blocks() -> None:
    assert doctor.ray_cluster("head").state == "blocker"


def test_a_cluster_without_a_token_is_a_warning_and_a_lost_token_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert doctor.ray_token("head:6379").state == "warning"
    assert doctor.ray_token(None).state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor.ray_token("head:6379").state == "blocker"
    (tmp_path / "token").write_text("a")
    assert doctor.ray_token("head:6379").state == "ok"


def test_a_root_below_a_file_blocks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert doctor.disk(str(tmp_path / "file" / "root")).state == "blocker"
    assert doctor.disk("nosuchstore://bucket/root").state == "blocker"
    assert doctor.mlflow_store(f"sqlite:///{tmp_path}/file/below/mlflow.db").state == "blocker"


def test_a_missing_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert doctor.shared_memory(tmp_path / "none").state == "warning"
