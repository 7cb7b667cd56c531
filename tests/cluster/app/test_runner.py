"""A driver that is stopped, or whose disk fails, says so and leaves what is finished for the next."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from mlflow.tracking import MlflowClient

from cluster.app import config as configs
from cluster.app import runner
from cluster.app.graph import Graph
from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.driver import lease
from cluster.driver.failures import explained
from cluster.driver.mlflow_store import sqlite_uri
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.parts import run_actors
from cluster.redaction import without_user
from cluster.stage import Stage
from tests.stages import simple

PARTS = {f"part-{i}.parquet": 1 for i in range(4)}
FIRST, *_, LAST = PARTS
SMALL, LARGE = 300_000, 3_000_000  # bytes of a part, and of one that is too large for the disk
SCHEMA = pa.schema([("content", pa.binary())])


def write(output: Output, part: str, size: int = SMALL) -> None:
    output.write_table(part, pa.table({"content": [os.urandom(size)]}), SCHEMA)


class Writer:
    """An actor that writes parts."""

    def __init__(self, job: "Job", cpus: float) -> None:
        self.job = job

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        name = str(row["part"][0])
        write(self.job.output, name, LARGE if name == self.job.large else SMALL)
        return {"part": [name], "rows": [1]}


class Job:
    def __init__(self, output: Output, large: str | None) -> None:
        self.output, self.large = output, large


def on_actors(large: str | None) -> Callable[[Output, Monitor], None]:
    """A stage's work on Ray actors."""
    return lambda output, monitor: run_actors(Writer, Job(output, large), PARTS, ActorResources(), monitor, "part")


def here(output: Output, monitor: Monitor) -> None:
    """A stage's work in the driver, too large for the disk."""
    write(output, FIRST)
    write(output, LAST, LARGE)


def graph(root: Path, folder: Path) -> Graph:
    return Graph(configs.load("grocery", [f"root={root}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]))


def output_of(graph: Graph) -> Output:
    return graph.output(simple("mine:x", 1, {}, here))


def run(graph: Graph, work: Callable[[Output, Monitor], None]) -> Output:
    """Run one stage. Its output is the same folder whatever the work is."""
    explained(runner.run)(graph, [simple("mine:x", 1, {}, work)])
    return output_of(graph)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_named_and_what_is_finished_stays(
    ray_session: None, store: Path, small_disk: Path, tmp_path: Path
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    small = graph(small_disk, tmp_path)
    for work in (here, on_actors(LAST)):
        with pytest.raises(UserError, match=r"a disk is full: OSError.*No space left on device.*\n.*goes on from"):
            run(small, work)
        output = output_of(small)
        assert lease.read(output) is None
        assert output.manifest() is None
        assert FIRST in output.parts()
        assert not [name for name in os.listdir(output.uri) if name.startswith(".part")]
    before = {name: Path(output.path(name)).stat().st_mtime_ns for name in output.parts()}
    assert run(small, on_actors(None)).manifest() is not None
    assert output.parts() == list(PARTS)
    assert all(Path(output.path(name)).stat().st_mtime_ns == before[name] for name in before)


def test_a_full_root_that_is_freed_goes_on(ray_session: None, small_disk: Path, tmp_path: Path) -> None:
    """MLflow's store lies in it too."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    subprocess.run(["mount", "-o", "remount,size=6m", small_disk], check=True)
    inside = Graph(configs.load("grocery", [f"root={small_disk}"]))
    runner.run(inside, [simple("mine:first", 1, {}, lambda output, monitor: write(output, FIRST))])
    for room in (0, 4096, 200_000):  # none for the store's own pages, some, and some for a part
        filler, free = small_disk / "filler", os.statvfs(small_disk)
        filler.write_bytes(bytes(max(free.f_bavail * free.f_frsize - room, 0)))
        with pytest.raises(UserError) as found:
            run(inside, on_actors(LAST))
        assert "disk" in str(found.value)
        filler.unlink()
    assert run(inside, on_actors(None)).manifest() is not None
    assert output_of(inside).parts() == list(PARTS)


def test_a_read_only_root_is_refused_in_one_line(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for root in (small_disk, small_disk / "new"):
        with pytest.raises(UserError, match=r"^root: .* cannot be written \(.*Read-only file system.*\); [^\n]*$"):
            run(graph(root, tmp_path), here)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^root: .* cannot be written \([^\n]*$"):
        run(graph(tmp_path / "file", tmp_path), here)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """A process that heeds Ctrl-C: what a shell puts in the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_driver_gives_its_lease_back_and_is_followed(
    ray_session: None, in_the_foreground: None, store: Path, tmp_path: Path, number: int
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def stopped(output: Output, monitor: Monitor) -> None:
        write(output, FIRST)
        os.kill(os.getpid(), number)
        for _ in range(3000):
            time.sleep(0.01)
        write(output, LAST)

    with pytest.raises(UserError, match="stopped; the same command goes on"):
        run(graph(tmp_path / "root", tmp_path), stopped)
    output = output_of(graph(tmp_path / "root", tmp_path))
    assert (output.parts(), output.manifest(), lease.read(output)) == ([FIRST], None, None)
    runs = MlflowClient(sqlite_uri(store)).search_runs(["1"])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]
    assert run(graph(tmp_path / "root", tmp_path), on_actors(None)).parts() == list(PARTS)


def named(name: str, work: Callable[[Output, Monitor], None], *parents: Stage) -> Stage:
    return simple(f"mine:{name}", 1, {}, work, {parent.name: parent for parent in parents})


def test_stages_that_need_nothing_of_each_other_work_side_by_side(ray_session: None, store: Path, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=60)

    def meet(output: Output, monitor: Monitor) -> None:
        both.wait()
        write(output, FIRST)

    first, second = named("a", meet), named("b", meet)

    def after(output: Output, monitor: Monitor) -> None:
        assert first.output(made.root).manifest()
        assert second.output(made.root).manifest()
        write(output, FIRST)

    made, child = graph(tmp_path / "root", tmp_path), named("c", after, first, second)
    runner.run(made, [first, second, child])
    assert made.output(child).manifest() is not None


def test_one_failure_lets_the_others_end_and_is_said(ray_session: None, store: Path, tmp_path: Path) -> None:
    failed = threading.Event()

    def fail(output: Output, monitor: Monitor) -> None:
        failed.set()
        raise UserError("no such thing")

    def go_on(output: Output, monitor: Monitor) -> None:
        assert failed.wait(60)
        time.sleep(1)
        write(output, FIRST)

    wrong, right = named("a", fail), named("b", go_on)
    never = named("c", go_on, right)
    made = graph(tmp_path / "root", tmp_path)
    with pytest.raises(UserError, match="no such thing"):
        runner.run(made, [wrong, right, never])
    assert [made.output(stage).manifest() is not None for stage in (wrong, right, never)] == [False, True, False]


def test_what_does_not_fit_waits(ray_session: None, store: Path, tmp_path: Path) -> None:
    alone = threading.Lock()

    def work(output: Output, monitor: Monitor) -> None:
        assert alone.acquire(blocking=False)
        time.sleep(0.5)
        alone.release()
        write(output, FIRST)

    stages = [named(name, work) for name in "abc"]
    made = Graph(
        configs.load("grocery", [f"root={tmp_path}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "resources.stages=1"])
    )
    runner.run(made, stages)
    assert all(made.output(stage).manifest() for stage in stages)


SECRETS = ["evaluate.images=nosuch://key:s3cr3t@bucket/photos", "sources.train=see https://me:s3cr3t@host/photos"]


def test_no_password_of_a_config_is_kept(
    ray_session: None, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Graph(configs.load("grocery", [f"root={tmp_path}/root", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", *SECRETS]))
    runner.run(made, [named("a", here)], keep_config=True)
    kept = runner.run_folder(made.config)
    assert kept.read_bytes("config.yaml").startswith(b"# kept without the passwords of its URIs; a run from it takes them from")
    assert configs.load(kept.path("config.yaml"), []).evaluate.images == "nosuch://bucket/photos"
    assert "MLFLOW_TRACKING_PASSWORD" in capsys.readouterr().err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "config.yaml", "mlflow.db", "manifest.json"} <= {path.name for path in files}
    assert [path for path in files if b"s3cr3t" in path.read_bytes()] == []


def test_rows_that_would_keep_a_password_are_refused(tmp_path: Path) -> None:
    images = "ingest.galleries.photos.images=nosuch://key:s3cr3t@bucket/photos"
    made = Graph(configs.load("grocery", [f"root={tmp_path}/root", images, "ingest.galleries.photos.copy_images=false"]))
    with pytest.raises(
        UserError, match=r"ingest.galleries.photos.images: it holds a password, which the output's rows would keep"
    ) as refused:
        runner.run(made, made.select(None, None, None))
    assert "s3cr3t" not in without_user(str(refused.value))
