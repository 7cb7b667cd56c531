"""A small graph of finished outputs, from the gallery to a composed-retrieval model."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save

from cluster.artifacts import Output
from cluster.monitor import Monitor
from cluster.stage import Stage
from tests.stages import simple

SCHEMA = pa.schema([("n", pa.int64())])


def table(output: Output, monitor: Monitor) -> None:
    """A stage's work: three rows, and a score of each."""
    for name in ("part-00000.parquet", "scores/part-00000.parquet"):
        output.write_table(name, pa.table({"n": [1, 2, 3]}), SCHEMA)


def _weights(output: Output, monitor: Monitor) -> None:
    output.write_bytes("weights.safetensors", save({"text.tower.weight": np.zeros(2, np.float32)}))
    output.write_json("cir.json", {"seed": 0})
    reports = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    output.write_json("training.json", {"best": reports[0]})
    output.write_bytes("metrics.jsonl", "\n".join(map(json.dumps, reports)).encode())


@pytest.fixture
def stages() -> dict[str, Stage]:
    """The stages by instance, parents before children."""
    made: dict[str, Stage] = {}

    def add(instance: str, **parents: str) -> None:
        work = _weights if instance.startswith(("instruct", "train")) else table
        made[instance] = simple(instance, 1, {"seed": 0}, work, {role: made[name] for role, name in parents.items()})

    add("ingest:shop")
    add("ingest:labelled")
    add("embed:photo.shop", gallery="ingest:shop")
    add("mine:shop", embeddings="embed:photo.shop")
    add("instruct:vdg", embeddings="embed:photo.shop", triplets="ingest:labelled")
    add("generate:shop", pairs="mine:shop", vdg="instruct:vdg", embeddings="embed:photo.shop")
    add("train:semi.s1", triplets="ingest:labelled", pseudo_triplets="generate:shop")
    return made


@pytest.fixture
def root(tmp_path: Path, stages: dict[str, Stage]) -> Path:
    """The root below which they are finished."""
    for stage in stages.values():
        stage.run(str(tmp_path), Monitor())
    return tmp_path
