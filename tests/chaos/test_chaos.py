"""Kill -9 at seeded moments of a small `vdg run`: it ends with the tables of an undisturbed run, by Ray's own retry or by
the same command again. `make chaos` runs it and prints a table.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from rich.table import Table
from safetensors.numpy import load

from cluster import lease
from cluster.app import config as configs
from cluster.app.pipeline import Pipeline
from cluster.artifacts import Output
from cluster.progress import console
from cluster.training import METRICS, WEIGHTS
from mining import tables
from tests.chaos.killing import assert_same_embeddings, assert_same_table, find, kill_when

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
LIMIT = 600  # seconds in which a disturbed run must end one way or the other
UNITS = {"embed": 16, "instruct": 8, "generate": 12}  # parts or checkpoints of each stage
SHOWN = {  # what a process of a kind shows, and the stages that it works in
    "embedding actor": ("Embedder", ["embed"]),
    "generation actor": ("PartGenerator", ["generate"]),
    "training worker": ("RayTrainWorker", ["instruct"]),
    "raylet": ("raylet/raylet", list(UNITS)),
    "driver": (None, list(UNITS)),
    "Ctrl-C": (None, list(UNITS)),
}
KILLS = [(kind, seed) for kind, count in zip(SHOWN, (4, 4, 4, 4, 6, 3), strict=True) for seed in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, photos: list[tuple[str, bytes]], tower: Any, language_model: Any) -> str:
    """A run on 48 photos: 16 parts of embeddings, 8 checkpoints of the generator, 12 parts of deltas."""
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "photos").mkdir()
    names = [key for key, _ in photos[:48]]
    for key, content in photos[:48]:
        (folder / "photos" / f"{key}.jpg").write_bytes(content)
    rows = [{"pairid": i, "reference": names[i], "target": names[i + 8], "captions": ["make it red"]} for i in range(40)]
    (folder / "triplets.json").write_text(json.dumps(rows))
    training = {"steps": 48, "batch_size": 8, "learning_rate": 1e-3}
    content = {
        "name": "chaos",
        "ingest": {
            "galleries": {"photos": {"images": str(folder / "photos")}},
            "triplets": {"labelled": {"gallery": "photos", "file": str(folder / "triplets.json")}},
            "shard_rows": 3,
        },
        "embed": {"towers": {"photo": tower.model_dump(mode="json")}},
        "mine": {"gallery": "photos", "tower": "photo", "method": "random", "random": {"pairs": 36}, "part_rows": 3},
        "vdg": {"tower": "photo", "language_model": language_model.model_dump(mode="json"), "prompt": "short", "lora_rank": 2},
        "align": None,
        "instruct": {"triplets": "labelled", "training": {**training, "checkpoint_every": 6}},
        "generate": {"max_new_tokens": 24, "temperature": 2.0, "precision": "fp32"},
        "train": {"tower": "photo", "triplets": "labelled", "training": training, "variants": {"semi": {"pseudo": True}}},
        "evaluate": {"images": str(folder / "photos"), "triplets": str(folder / "triplets.json")},
        "resources": {"ray": {"num_cpus": 4}},
    }
    (folder / "chaos.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "chaos.yaml")


def start(config: str, root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from cluster.app.cli import main; main()", "run", config]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [*command, "--set", f"root={root}", "--until", "generate"],
        stderr=(root.parent / f"{root.name}.log").open("ab"),
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
    )


def log(root: Path) -> str:
    return (root.parent / f"{root.name}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nothing happened to."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    root.mkdir()
    assert start(config, root).wait(LIMIT) == 0, log(root)
    return root


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


@pytest.mark.parametrize(("kind", "seed"), KILLS)
def test_a_kill_changes_no_table(
    kind: str, seed: int, config: str, undisturbed: Path, tmp_path: Path, outcomes: list[tuple[str, ...]]
) -> None:
    shown, stages = SHOWN[kind]
    rng = np.random.default_rng([list(SHOWN).index(kind), seed])
    stage = stages[rng.integers(len(stages))]
    after, pause = int(rng.integers(UNITS[stage] - 1)), rng.uniform(0, 0.05)
    root = shutil.copytree(undisturbed, tmp_path / "root")
    shutil.rmtree(root / stage)
    pipeline, expected = (Pipeline(configs.load(config, [f"root={path}"])) for path in (root, undisturbed))
    of_stage = {"embed": pipeline.embeddings("photo", "photos"), "instruct": pipeline.generator()}
    count = counter(pipeline.output(of_stage.get(stage, pipeline.pseudo_triplets())))

    def ready() -> bool:
        if count() < after:
            return False
        time.sleep(pause)
        return True

    began = time.monotonic()
    driver = start(config, root)
    victim = partial(psutil.Process, driver.pid) if shown is None else partial(find, driver.pid, shown)
    number = signal.SIGINT if kind == "Ctrl-C" else signal.SIGKILL
    assert kill_when(victim, ready, lambda: driver.poll() is None, number), log(root)
    status = driver.wait(LIMIT)
    if status:
        assert kind != "Ctrl-C" or (status == 2 and "the same command goes on" in log(root)), log(root)
        assert start(config, root).wait(LIMIT) == 0, log(root)
    finished = "the same command" if status else "Ray's own retry"
    outcomes.append((kind, str(seed), stage, str(after), finished, f"{time.monotonic() - began:.0f}"))
    assert_same(pipeline, expected)


def assert_same(found: Pipeline, expected: Pipeline) -> None:
    """Embeddings, pairs and deltas; the generator's curve and weights; every manifest, and no lease."""
    stages = found.select(None, None, "generate")
    for output in map(found.output, stages):
        assert output.manifest() is not None
        assert lease.read(output) is None
    embeddings, pairs, deltas, model = (
        (found.output(stage), expected.output(stage))
        for stage in (found.embeddings("photo", "photos"), found.pairs, found.pseudo_triplets(), found.generator())
    )
    assert_same_embeddings(*embeddings)
    assert_same_table(*pairs, tables.PAIRS, "pair_id")
    assert_same_table(*deltas, tables.TRIPLETS, "triplet_id")
    curves = [[json.loads(line) for line in output.read_bytes(METRICS).splitlines()] for output in model]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    assert [row["loss"] for row in curves[0]] == pytest.approx([row["loss"] for row in curves[1]], rel=1e-5)
    weights = [load(output.read_bytes(WEIGHTS)) for output in model]
    for name, value in weights[1].items():
        assert np.allclose(weights[0][name], value, atol=1e-6)
