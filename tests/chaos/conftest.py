"""A small run, driven as a user drives it, and what its tables must be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load

from cluster.app.graph import Graph
from cluster.driver import lease
from cluster.training.checkpoints import WEIGHTS
from cluster.training.loop import METRICS
from mining import tables
from tests.chaos.killing import assert_same_embeddings, assert_same_table

REPOSITORY = Path(__file__).parents[2]
LIMIT = 600  # seconds in which a run must end one way or the other


@pytest.fixture(scope="session")
def config(
    tmp_path_factory: pytest.TempPathFactory, photos: list[tuple[str, bytes]], tower: Any, language_model: Any, tiny_bert: Any
) -> str:
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
        "train": {
            "tower": "photo",
            "triplets": "labelled",
            "text": tiny_bert,
            "fusion": "residual",
            "training": training,
            "variants": {"semi": {"pseudo": True}},
        },
        "evaluate": {"images": str(folder / "photos"), "triplets": str(folder / "triplets.json")},
        "resources": {"ray": {"num_cpus": 4}},
    }
    (folder / "chaos.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "chaos.yaml")


def start(config: str, root: str, log: Path, *assignments: str) -> subprocess.Popen[bytes]:
    """Begin `vdg run` until its deltas are generated; what it says goes to the end of `log`."""
    command = [sys.executable, "-c", "from cluster.app.cli import program; program()", "run", config]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    options = [word for assignment in (f"root={root}", *assignments) for word in ("--set", assignment)]
    return subprocess.Popen(
        [*command, *options, "--until", "generate"],
        stderr=log.open("ab"),
        cwd=log.parent,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
    )


@pytest.fixture(scope="session")
def undisturbed(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(config, str(folder / "root"), folder / "log").wait(LIMIT) == 0, (folder / "log").read_text()
    return folder / "root"


def assert_same(found: Graph, expected: Graph) -> None:
    """Embeddings, pairs and deltas; the generator's curve and weights; every manifest, and no live lease."""
    stages = found.select(None, None, "generate")
    for output in map(found.output, stages):
        assert output.manifest() is not None
        left = lease.read(output)  # of a driver that was killed right behind its manifest
        assert left is None or left.live is False
    embeddings, pairs, deltas, model = (
        (found.output(found[instance]), expected.output(expected[instance]))
        for instance in ("embed:photo.photos", "mine:photos", "generate:photos", "instruct:vdg")
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
