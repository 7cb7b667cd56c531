"""What stages ask for that no node has."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from cluster.artifacts import Output
from cluster.config import ActorResources, DecodeResources, EmbedResources, Resources, TaskResources, WorkerResources
from cluster.driver.demand import Node, nodes, require, shortages
from cluster.driver.session import RayConfig
from cluster.errors import UserError
from cluster.stage import RunContext, Stage


@dataclass(frozen=True, eq=False, kw_only=True)
class Work(Stage, kind="train"):
    resources: Resources

    def work(self, output: Output, run: RunContext) -> None:
        raise NotImplementedError


def node(**has: float) -> Node:
    return defaultdict(float, has)


def missing(resources: Resources, *there: Node) -> dict[str, str]:
    return shortages([Work(name="x", resources=resources)], there)


TWO = node(CPU=2.0)


@pytest.mark.parametrize(
    ("resources", "there", "fits"),
    [
        (TaskResources(cpus=2), (TWO,), True),
        (TaskResources(cpus=3), (TWO, TWO), False),  # no process spans nodes
        (TaskResources(gpus=1), (TWO,), False),
        (TaskResources(gpus=0.5), (TWO, node(CPU=1, GPU=1)), True),
        (TaskResources(memory_gb=8), (node(CPU=2, memory=4 * 2**30),), False),
        (TaskResources(accelerator_type="A100"), (node(CPU=2, GPU=1),), False),
        (TaskResources(accelerator_type="A100"), (node(CPU=2, **{"accelerator_type:A100": 1.0}),), True),
        (WorkerResources(workers=2, cpus=2), (TWO, TWO), True),
        (WorkerResources(workers=3, cpus=2), (TWO, TWO), False),  # workers start together
        (WorkerResources(workers=0, cpus=64, gpus=8), (TWO,), True),  # in the driver
        (ActorResources(actors=9), (TWO,), True),  # a pool begins with those that there is room for
        (DecodeResources(decode_tasks=9), (TWO,), True),
        (DecodeResources(decode_cpus=3), (TWO,), False),
        (EmbedResources(), (TWO,), True),
        (EmbedResources(actors=2), (TWO,), False),  # the actors leave no CPU for what feeds them
        (EmbedResources(cpus=2), (TWO,), False),
        (EmbedResources(gpus=1), (node(CPU=1, GPU=1), node(CPU=1)), True),
    ],
)
def test_what_has_to_be_there_at_once(resources: Resources, there: tuple[Node, ...], fits: bool) -> None:
    assert missing(resources, *there) is not fits


def test_the_message_says_what_is_asked_for_and_what_there_is() -> None:
    asked = missing(WorkerResources(workers=2, gpus=1, memory_gb=8, accelerator_type="A100"), TWO, TWO)
    assert asked == {
        "resources.train": "asks at once for 2 x (1 CPU, 1 GPU, 8.0 GB, A100); the cluster has 2 node(s): 2 CPU, 0 GPU; "
        "ask for less, or add nodes"
    }


def test_before_a_session_this_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (here,) = nodes(RayConfig(num_cpus=3)) or []
    assert (here["CPU"], here["memory"]) == (3.0, math.inf)  # Ray says how much memory it gives
    assert nodes(RayConfig(address="10.0.0.1:6379")) is None


def test_a_cluster_that_grows_is_waited_for(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[Any] = [Work(name="x", resources=TaskResources(gpus=1)), Work(name="y", resources=TaskResources(gpus=1))]
    there = nodes(RayConfig()) or []
    with pytest.raises(UserError, match=r"^resources.train: asks at once for 1 CPU, 1 GPU; the cluster has 1 node"):
        require(stages, there)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Labels": {"ray.io/node-group": "small"}}])
    assert len(require(stages, there)) == 1
