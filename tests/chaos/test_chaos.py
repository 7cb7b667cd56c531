"""Kill -9 at seeded moments of a small `vdg run`: it ends with the tables of an undisturbed run, by Ray's own retry or by
the same command again. `make chaos` runs it and prints a table.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow.tracking import MlflowClient
from rich.table import Table

from cluster.app import config as configs
from cluster.app.graph import Graph
from cluster.artifacts import MANIFEST, Output
from cluster.driver import lease
from cluster.driver.mlflow_store import sqlite_uri
from cluster.driver.progress import console
from cluster.training.checkpoints import latest
from cluster.training.loop import METRICS
from tests.chaos.conftest import LIMIT, assert_same, start
from tests.chaos.killing import find, kill_when

pytestmark = pytest.mark.slow
LATEST = {"embed": 8, "instruct": 7, "generate": 6}  # parts or checkpoints after which the kill comes, of 16, 8 and 12
SHOWN = {  # what a process of a kind shows, and the stages that it works in
    "embedding actor": ("Embedder", ["embed"]),
    "generation actor": ("PartGenerator", ["generate"]),
    "training worker": ("RayTrainWorker", ["instruct"]),
    "raylet": ("raylet/raylet", list(LATEST)),
    "driver": (None, list(LATEST)),
    "Ctrl-C": (None, list(LATEST)),
    "SIGTERM": (None, list(LATEST)),
}
KILLS = [(kind, seed) for kind, count in zip(SHOWN, (4, 4, 4, 4, 6, 3, 3), strict=True) for seed in range(count)]
STOPS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[list[tuple[str, ...]]]:
    """Rows of the table that is printed at the end."""
    rows: list[tuple[str, ...]] = []
    yield rows
    table = Table("kill -9 of", "seed", "in", "after", "finished by", "seconds", title="chaos: the same tables each time")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def counter(output: Output) -> Callable[[], int]:
    """Counts what a stage has finished so far: its parts, or the checkpoints that it ever had."""
    checkpoints: set[str] = set()

    def count() -> int:
        folder = Path(output.path("checkpoints"))
        checkpoints.update(path.name for path in folder.glob("checkpoint_*"))
        return len(checkpoints) + len(output.parts())

    return count


def statuses(root: Path) -> list[str]:
    """Of the runs in the root's MLflow store."""
    client = MlflowClient(sqlite_uri(root / "mlflow.db"))
    return [run.info.status for run in client.search_runs(["1"], max_results=1000)]


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_in_the_birth_of_mlflows_store(
    seed: int, config: str, undisturbed: Path, tmp_path: Path, outcomes: list[tuple[str, ...]]
) -> None:
    """Within the 1.2 seconds in which its tables are made."""
    root, log = shutil.copytree(undisturbed, tmp_path / "root"), tmp_path / "log"
    (root / "mlflow.db").unlink()
    pause = np.random.default_rng(seed).uniform(0, 1.2)

    def ready() -> bool:
        if not list(root.glob(".mlflow.db.new/*.db")):
            return False
        time.sleep(pause)
        return True

    began = time.monotonic()
    driver = start(config, str(root), log)
    assert kill_when(lambda: [psutil.Process(driver.pid)], ready, lambda: driver.poll() is None), log.read_text()
    assert driver.wait(LIMIT) == -signal.SIGKILL
    assert start(config, str(root), log).wait(LIMIT) == 0, log.read_text()
    assert "FINISHED" in statuses(root)
    outcomes.append(
        ("driver", str(seed), "MLflow's birth", f"{pause:.2f} s", "the same command", f"{time.monotonic() - began:.0f}")
    )


@dataclass(frozen=True)
class Killed:
    """A run whose stage is still to be done, and the run that nothing happened to."""

    stage: str
    root: Path
    graph: Graph
    expected: Graph

    @classmethod
    def of(cls, stage: str, config: str, undisturbed: Path, folder: Path) -> "Killed":
        root = shutil.copytree(undisturbed, folder / "root")
        shutil.rmtree(root / stage)
        return cls(stage, root, *(Graph(configs.load(config, [f"root={path}"])) for path in (root, undisturbed)))

    @property
    def output(self) -> Output:
        of_stage = {"embed": self.graph["embed:photo.photos"], "instruct": self.graph["instruct:vdg"]}
        return self.graph.output(of_stage.get(self.stage, self.graph["generate:photos"]))

    def outlives(self, config: str, shown: str | None, number: int, ready: Callable[[], bool]) -> tuple[str, str]:
        """Kill the process that shows a name, or the driver, when it is time, and do the run again where that ended it.

        Returns what finished it, and the seconds of it all. AssertionError when a table is another.
        """
        began, log = time.monotonic(), self.root.parent / "log"
        driver = start(config, str(self.root), log)
        victims = partial(find, driver.pid, shown) if shown else lambda: [psutil.Process(driver.pid)]
        assert kill_when(victims, ready, lambda: driver.poll() is None, number), log.read_text()
        status = driver.wait(LIMIT)
        if status:
            if number != signal.SIGKILL:
                assert status == 2, log.read_text()
                assert log.read_text().splitlines()[-1] == "error: stopped; the same command goes on from what is finished"
                assert set(statuses(self.root)) == {"FINISHED", "KILLED"}
            assert start(config, str(self.root), log).wait(LIMIT) == 0, log.read_text()
        assert_same(self.graph, self.expected)
        return "the same command" if status else "Ray's own retry", f"{time.monotonic() - began:.0f}"


@pytest.mark.parametrize(("kind", "seed"), KILLS)
def test_a_kill_changes_no_table(
    kind: str, seed: int, config: str, undisturbed: Path, tmp_path: Path, outcomes: list[tuple[str, ...]]
) -> None:
    shown, stages = SHOWN[kind]
    rng = np.random.default_rng([list(SHOWN).index(kind), seed])
    stage = stages[rng.integers(len(stages))]
    after, pause = int(rng.integers(LATEST[stage])), rng.uniform(0, 0.01)
    run = Killed.of(stage, config, undisturbed, tmp_path)
    count = counter(run.output)

    def ready() -> bool:
        if lease.read(run.output) is None or count() < after:
            return False
        time.sleep(pause)
        return True

    finished = run.outlives(config, shown, STOPS.get(kind, signal.SIGKILL), ready)
    outcomes.append((kind, str(seed), stage, str(after), *finished))


@pytest.mark.parametrize("stage", LATEST)
def test_a_kill_in_the_writing_of_a_manifest(
    stage: str, config: str, undisturbed: Path, tmp_path: Path, outcomes: list[tuple[str, ...]]
) -> None:
    run = Killed.of(stage, config, undisturbed, tmp_path)
    folder = Path(run.output.uri)

    def ready() -> bool:
        if not folder.exists() or not (list(folder.glob("part-*")) or (folder / METRICS).exists()):
            return False
        deadline = time.monotonic() + LIMIT
        while not any(MANIFEST in name for name in os.listdir(folder)):  # half-written ones have a name that contains it
            assert time.monotonic() < deadline
        return True

    outcomes.append(("driver", "-", stage, "its manifest begins", *run.outlives(config, None, signal.SIGKILL, ready)))


@pytest.mark.parametrize("shown", [None, "RayTrainWorker"])
def test_a_kill_after_a_complete_checkpoint(
    shown: str | None, config: str, undisturbed: Path, tmp_path: Path, outcomes: list[tuple[str, ...]]
) -> None:
    run = Killed.of("instruct", config, undisturbed, tmp_path)

    def ready() -> bool:
        return latest(run.output) is not None

    finished = run.outlives(config, shown, signal.SIGKILL, ready)
    outcomes.append((shown or "driver", "-", "instruct", "a checkpoint", *finished))
