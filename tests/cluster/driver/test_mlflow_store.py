"""MLflow's SQLite file: made whole or not at all, one message when it fails."""

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.driver.mlflow_store import reason, said, set_aside, sqlite_file, sqlite_uri
from cluster.driver.tracking import Tracker
from cluster.errors import UserError

DRIVERS = multiprocessing.get_context("forkserver")
DRIVERS.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store", __name__])  # seconds for each otherwise


def track(path: Path) -> None:
    Tracker(sqlite_uri(path), "vdg", "run", {}).finish("FINISHED", {})


def driver(path: Path) -> ForkServerProcess:
    process = DRIVERS.Process(target=track, args=(path,))
    process.start()
    return process


def runs(path: Path) -> list[str]:
    client = MlflowClient(sqlite_uri(path))
    experiment = client.get_experiment_by_name("vdg")
    assert experiment is not None
    return sorted(run.info.status for run in client.search_runs([experiment.experiment_id]))


@pytest.mark.parametrize("pause", [0.0, 0.1, 0.3, 0.8])
def test_a_driver_killed_in_the_birth_leaves_nothing_half(tmp_path: Path, pause: float) -> None:
    """Nothing, or on a fast machine a whole one, as the file gets its name last."""
    path = tmp_path / "mlflow.db"
    killed = driver(path)
    while not list(tmp_path.glob(".mlflow.db.new/*.db")):
        time.sleep(0.005)
    time.sleep(pause)
    killed.kill()
    killed.join()
    whole = path.exists()
    Tracker(sqlite_uri(path), "vdg", "run", {})
    assert {name for name in os.listdir(tmp_path) if "new" in name} == set()
    assert runs(path) == ["RUNNING"] or whole


def test_of_two_drivers_on_a_fresh_root_one_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "root" / "mlflow.db"
    both = [driver(path) for _ in range(2)]
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    assert runs(path) == ["FINISHED", "FINISHED"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk too small for the tables."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_leaves_nothing_half(small_disk: Path) -> None:
    uri = sqlite_uri(small_disk / "mlflow.db")
    with pytest.raises(UserError, match=r"^tracking.uri: .*full[^\n]*$"):
        Tracker(uri, "vdg", "run", {})
    assert {name for name in os.listdir(small_disk) if not name.endswith(".lock")} == set()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    Tracker(uri, "vdg", "run", {})


def broken(path: Path, kind: str) -> None:
    if kind == "half":
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript("DROP TABLE datasets; UPDATE alembic_version SET version_num = 'cc1f77228345'")
    elif kind == "cut":
        os.truncate(path, 4096)
    else:
        path.write_bytes({"text": b"no database at all" * 999, "header": b"SQLite format 3\0" + b"x" * 9999}[kind])


@pytest.mark.parametrize("kind", ["half", "cut", "text", "header"])
def test_a_damaged_one_is_one_message_and_set_aside(store: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    broken(store, kind)
    before, uri = store.read_bytes(), sqlite_uri(store)
    with pytest.raises(UserError, match=r"^tracking.uri: [^\n]*it is damaged: `vdg track`[^\n]*$"):
        Tracker(uri, "vdg", "run", {})
    assert capfd.readouterr().err == ""
    aside = set_aside(uri)
    assert aside == store.with_name("mlflow.db.damaged-1")
    assert aside.stat().st_size == len(before)
    assert not store.exists()
    assert set_aside(uri) is None


def test_the_reason_is_said_and_not_how_sqlalchemy_got_there() -> None:
    said_by_it = "(raised as a result of Query-invoked autoflush)\n(sqlite3.OperationalError) database is locked\n[SQL: X]"
    assert reason(Exception(said_by_it)) == "(sqlite3.OperationalError) database is locked"


def test_an_empty_file_is_none(store: Path) -> None:
    store.write_bytes(b"")
    Tracker(sqlite_uri(store), "vdg", "run", {})
    assert store.stat().st_size > 0


@pytest.mark.parametrize("problem", ["locked", "folder", "link", "pipe", "read-only", "later"])
def test_what_is_not_damaged_is_left_alone(store: Path, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, holder = sqlite_uri(store), sqlite3.connect(store)
    if problem == "locked":
        monkeypatch.setattr(sqlite3, "connect", lambda *args, real=sqlite3.connect, **kw: real(*args, **{**kw, "timeout": 0.1}))
        holder.execute("BEGIN EXCLUSIVE")
    elif problem == "later":  # a store of an MLflow to come
        holder.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        holder.commit()
    elif problem == "folder":
        store.unlink()
        store.mkdir()
    elif problem == "link":  # to a disk that is not there
        store.unlink()
        store.symlink_to(store.parent / "disk" / "mlflow.db")
    elif problem == "pipe":
        store.unlink()
        os.mkfifo(store)
    elif os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    else:
        store.chmod(0)
    with pytest.raises(UserError, match=r"^tracking.uri: [^\n]*cannot be used[^\n]*see that it answers[^\n]*$"):
        Tracker(uri, "vdg", "run", {})
    with pytest.raises(UserError, match="cannot be used"), said(uri):
        set_aside(uri)
    assert os.path.lexists(store)
    holder.close()


def test_a_deleted_experiment_says_so(store: Path) -> None:
    uri = sqlite_uri(store)
    tracker = Tracker(uri, "it's", "run", {})
    tracker.client.delete_experiment(tracker.experiment)
    with pytest.raises(UserError, match=r"tracking.experiment: 'it's' is deleted in MLflow.*restore --experiment-id 1"):
        Tracker(uri, "it's", "run", {})
    tracker.client.restore_experiment(tracker.experiment)
    Tracker(uri, "it's", "run", {}, again=True)


@pytest.mark.parametrize("name", ["a b", "a#b", "a'b", 'a"b', "a%b", "ü", "a&b;c", "a@b:c", "a+b"])
def test_odd_names_of_folders(empty_store: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(empty_store, folder)
    tracker = Tracker(sqlite_uri(folder / "mlflow.db"), "vdg", "run", {"seed": 1})
    assert runs(folder / "mlflow.db") == ["RUNNING"]
    assert (folder / "mlartifacts").is_dir()
    kept = tracker.client.download_artifacts(tracker.parent, "config.json", str(tmp_path))
    assert "seed" in Path(kept).read_text()
    assert sorted(os.listdir(folder)) == ["mlartifacts", "mlflow.db"]


@pytest.mark.parametrize("name", ["a?b", "a%25b", "a%2Fb"])
def test_folders_that_a_uri_cannot_say_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"root: .* has a '\?' or '%'"):
        sqlite_uri(tmp_path / name / "mlflow.db")


def test_forms_of_uris(tmp_path: Path) -> None:
    assert sqlite_file("sqlite:////a/b.db") == sqlite_file("sqlite+pysqlite:////a/b.db") == Path("/a/b.db")
    assert sqlite_file("sqlite:///b.db") == Path.cwd() / "b.db"
    for uri in ("sqlite://", "sqlite:///:memory:", "http://h:5000", "sqlite", "sqlite:b", "", "mlruns", "postgresql://h/db"):
        assert sqlite_file(uri) is None
    for uri in ("sqlite", "sqlite:b", "foo://b", "postgresql://x:y"):
        with pytest.raises(UserError, match=r"tracking.uri: MLflow at .* cannot be used"):
            Tracker(uri, "vdg", "run", {})
