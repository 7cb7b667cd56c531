"""Parts of a stage by a pool of actors."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.parts import run_actors
from tests.conftest import Recorder

ROW = pa.schema([("row", pa.int64())])
PARTS = {f"part-{i:05d}.parquet": 1 for i in range(300)}


@dataclass(frozen=True)
class _Job:
    output: Output


class _Model:
    """Leaves a mark when it is loaded."""

    def __init__(self, job: _Job, cpus: float) -> None:
        self.output = job.output
        self.output.write_bytes(f"loaded/{id(self)}-{len(self.output.names('loaded'))}", b"")

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, Any]:
        self.output.write_table(str(row["part"][0]), pa.table([[0]], schema=ROW), ROW)
        return {"part": row["part"], "rows": [1]}


def test_a_stage_loads_its_models_once(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    output, resources = Output(str(tmp_path / "o")), ActorResources(cpus=0.5)
    began = time.monotonic()
    run_actors(_Model, _Job(output), PARTS, resources, monitor, "row")
    assert 0 < monitor.seconds < time.monotonic() - began  # one actor, a part at a time
    assert output.parts() == sorted(PARTS)
    assert (monitor.total, monitor.advanced, len(output.names("loaded"))) == (300, 300, 1)
    run_actors(_Model, _Job(output), PARTS, resources, monitor, "row")
    assert (monitor.resumed, len(output.names("loaded"))) == (300, 1)
