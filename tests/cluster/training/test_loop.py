import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load

from cluster.artifacts import Output
from cluster.config import TrainingConfig, WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.training.checkpoints import WEIGHTS
from cluster.training.engine import learning_rate_factor
from cluster.training.groups import Groups
from cluster.training.loop import METRICS, TRAINING, sample_rows, train, unlearned
from tests.conftest import Recorder

LOCAL = WorkerResources(workers=0)


class Regression(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Linear(4, 1)
        self.frozen = torch.nn.Linear(4, 1).requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"loss": ((self.line(batch["x"]) - batch["x"].sum(1, keepdim=True)) ** 2).mean()}


@dataclass
class RegressionTask:
    """y = sum of x. Fails once at the validation `fail_at`, or is killed there."""

    best_metric: str | None = None
    fail_at: int | None = None
    killed: bool = False
    marker: str = ""
    best_step: int | None = None

    @property
    def size(self) -> int:
        return 40

    def build(self) -> Regression:
        return Regression()

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        x = np.stack([np.random.default_rng(row).normal(size=4) for row in rows]) + 0.01 * rng.normal(size=(len(rows), 4))
        return {"x": torch.from_numpy(x).float()}

    def validate(self, module: Regression) -> dict[str, float]:
        self._calls = getattr(self, "_calls", 0) + 1
        if self.fail_at == self._calls and not Path(self.marker).exists():
            Path(self.marker).touch()
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("gave up")
        error = float((module.line.weight - 1).abs().sum())
        return {"val": -error if self.best_step is None else float(self._calls == self.best_step)}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 30, "batch_size": 8, "learning_rate": 0.05, "checkpoint_every": 10} | changes)


def losses(output: Output) -> dict[int, float]:
    lines = [json.loads(line) for line in output.read_bytes(METRICS).decode().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_sample_rows_visits_every_row_once_an_epoch() -> None:
    steps = [sample_rows(40, 8, step, seed=3) for step in range(10)]
    assert sorted(np.concatenate(steps[:5])) == list(range(40))
    assert not np.array_equal(steps[0], steps[5])
    assert np.array_equal(steps[3], sample_rows(40, 8, 3, seed=3))
    assert len(sample_rows(5, 8, 0, seed=0)) == 8


def test_learning_rate_schedules() -> None:
    cosine = config(steps=100, warmup_steps=10)
    assert learning_rate_factor(cosine, 0) == pytest.approx(0.1)
    assert learning_rate_factor(cosine, 10) == pytest.approx(1.0)
    assert learning_rate_factor(cosine, 55) == pytest.approx(0.5)
    halved = config(steps=100, schedule="tenth_after_half")
    assert [learning_rate_factor(halved, step) for step in (49, 50)] == [1.0, 0.1]


def test_batch_must_divide() -> None:
    with pytest.raises(UserError, match="no multiple"):
        config(batch_size=6).accumulation(4)
    assert config(batch_size=64, micro_batch=8).accumulation(2) == (8, 4)


def test_trains_and_saves_only_trained_parameters(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    output = Output(str(tmp_path / "out"))
    metrics = train(output, RegressionTask(), config(steps=200), 0, LOCAL, monitor)
    weights = load(output.read_bytes(WEIGHTS))
    assert set(weights) == {"line.weight", "line.bias"}
    assert metrics["step"] == 200
    assert torch.allclose(weights["line.weight"], torch.ones(1, 4), atol=0.1)
    assert max(monitor.reports)[0] == 200


def test_keeps_the_best_checkpoint(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    output = Output(str(tmp_path / "out"))
    metrics = train(output, RegressionTask(best_metric="val", best_step=2), config(), 0, LOCAL, monitor)
    assert metrics["step"] == 20


class Diverging(RegressionTask):
    """Validates to what is listed."""

    def validate(self, module: Regression) -> dict[str, float]:
        self._calls = getattr(self, "_calls", 0) + 1
        return {"val": [float("nan"), 1.0, float("nan")][self._calls - 1]}


def test_a_metric_that_is_not_a_number_is_never_the_best(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    output = Output(str(tmp_path / "out"))
    assert train(output, Diverging(best_metric="val"), config(), 0, LOCAL, monitor)["step"] == 20


def test_accumulation_gives_the_same_update(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    @dataclass
    class Plain(RegressionTask):
        def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
            return {"x": torch.from_numpy(np.eye(4)[rows % 4]).float()}

    weights = []
    for name, micro in (("whole", None), ("accumulated", 2)):
        output = Output(str(tmp_path / name))
        train(output, Plain(), config(micro_batch=micro), 0, LOCAL, monitor)
        weights.append(load(output.read_bytes(WEIGHTS))["line.weight"])
    assert torch.allclose(*weights, atol=1e-5)


def test_training_again_with_another_number_of_workers_is_no_other_training() -> None:
    assert "on_changed_world" in WorkerResources.model_fields
    assert "on_changed_world" not in TrainingConfig.model_fields


class Mistaken(RegressionTask):
    """What only a loaded model shows."""

    def build(self) -> Regression:
        with Path(self.marker).open("a") as file:
            file.write("built\n")
        raise UserError("lora_targets: no such layer")


def test_a_users_mistake_in_local_mode(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    with pytest.raises(UserError, match="no such layer"):
        train(Output(str(tmp_path / "out")), Mistaken(marker=str(tmp_path / "built")), config(), 0, LOCAL, monitor)
    train(Output(str(tmp_path / "next")), RegressionTask(), config(steps=2), 0, LOCAL, monitor)  # nothing is left behind


class NotFinite(RegressionTask):
    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        return {name: value * float("nan") for name, value in super().batch(rows, rng).items()}


def test_a_loss_that_is_not_finite_stops_at_once(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    with pytest.raises(UserError, match="step 1: loss is nan; lower learning_rate"):
        train(Output(str(tmp_path / "out")), NotFinite(), config(), 0, WorkerResources(workers=0), monitor)


class Steep(Regression):
    """Its loss is finite, and its gradient is not."""

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(batch)["loss"] + (self.line.weight.sum() * 0).abs().sqrt()}


class SteepTask(RegressionTask):
    def build(self) -> Regression:
        return Steep()


@pytest.mark.parametrize(
    ("steps", "expected"), [(3, "step 2: loss is nan; lower"), (1, "step 1: the weights are not finite; lower")]
)
def test_a_gradient_that_is_not_finite_stops_at_once(
    steps: int, expected: str, ray_session: None, tmp_path: Path, monitor: Monitor
) -> None:
    output = Output(str(tmp_path / "out"))
    with pytest.raises(UserError, match=expected):
        train(output, SteepTask(), config(steps=steps, checkpoint_every=None), 0, LOCAL, monitor)
    assert not output.exists(WEIGHTS)


class DivergedTask(RegressionTask):
    def validate(self, module: Regression) -> dict[str, float]:
        raise UserError("the training diverged")


def test_a_mistake_in_validation_is_no_failed_worker(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    with pytest.raises(UserError, match=r"^the training diverged$"):
        train(Output(str(tmp_path)), DivergedTask(), config(), 0, LOCAL, monitor)


def test_a_learning_rate_of_no_parameter_is_named(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    rates = config(learning_rates={"projektion": 0.1})
    with pytest.raises(UserError, match=r"'projektion'.*\['line'\]"):
        train(Output(str(tmp_path)), RegressionTask(), rates, 0, LOCAL, monitor)


def test_a_training_cut_off_after_its_last_step_is_not_done_again(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    output = Output(str(tmp_path / "out"))
    best = train(output, RegressionTask(), config(steps=2), 0, LOCAL, monitor)
    output.write_bytes("checkpoints/checkpoint_manager_snapshot.json", b"half")  # its removal was cut off too
    assert train(output, Mistaken(marker=str(tmp_path / "built")), config(steps=2), 0, LOCAL, monitor) == best
    assert not output.exists("checkpoints")


def test_a_checkpoint_that_is_not_whole_is_none(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    output = Output(str(tmp_path / "out"))
    output.write_bytes("checkpoints/checkpoint_000000020/weights.safetensors", b"half")
    assert train(output, RegressionTask(), config(), 0, LOCAL, monitor)["step"] == 30
    assert monitor.resumed == 0


def test_a_training_in_the_driver_goes_on_from_its_checkpoint(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    whole, broken = Output(str(tmp_path / "whole")), Output(str(tmp_path / "broken"))
    train(whole, RegressionTask(), config(), 0, LOCAL, monitor)
    with pytest.raises(RuntimeError, match="gave up"):
        train(broken, RegressionTask(fail_at=2, marker=str(tmp_path / "failed")), config(), 0, LOCAL, monitor)
    train(broken, RegressionTask(), config(), 0, LOCAL, monitor)
    assert monitor.resumed == 10
    assert losses(broken) == pytest.approx(losses(whole))


@pytest.mark.parametrize("damage", ["state", "weights", "cut", "gone", "foreign"])
def test_a_damaged_checkpoint_is_as_good_as_none(ray_session: None, tmp_path: Path, monitor: Recorder, damage: str) -> None:
    output = Output(str(tmp_path / "out"))
    with pytest.raises(RuntimeError, match="gave up"):
        train(output, RegressionTask(fail_at=2, marker=str(tmp_path / "failed")), config(), 0, LOCAL, monitor)
    folder = Path(output.path("checkpoints/checkpoint_000000010"))
    optimizer = next(folder.rglob("*optim*"))
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 4
    if damage == "weights":
        (folder / WEIGHTS).write_bytes(content)
    elif damage == "cut":
        optimizer.write_bytes(optimizer.read_bytes()[:-100])
    elif damage == "gone":
        optimizer.unlink()
    else:
        (folder / "state.json").write_text("[]" if damage == "state" else '{"step": "ten", "foreign": 1}')
    monitor.resumed = 0
    assert train(output, RegressionTask(), config(), 0, LOCAL, monitor)["step"] == 30
    assert monitor.resumed == 0


def test_a_training_in_the_driver_leaves_nothing_in_the_temporary_folder(
    tmp_path: Path, monitor: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    written = []

    class Watching(RegressionTask):
        def validate(self, module: Regression) -> dict[str, float]:
            written.extend(path.name for path in temporary.rglob("*.pt"))
            return super().validate(module)

    task = Watching(fail_at=3, marker=str(tmp_path / "failed"))
    with pytest.raises(RuntimeError, match="gave up"):
        train(Output(str(tmp_path / "out")), task, config(), 0, LOCAL, monitor)
    assert not list(temporary.iterdir())
    train(Output(str(tmp_path / "out")), RegressionTask(), config(), 0, LOCAL, monitor)
    assert not written
    assert not list(temporary.iterdir())


class Counting(RegressionTask):
    """Notes the process that it is built in."""

    def build(self) -> Regression:
        with Path(self.marker).open("a") as file:
            file.write(f"{os.getpid()}\n")
        return Regression()


class Threads(RegressionTask):
    """Notes how many it has."""

    def build(self) -> Regression:
        Path(self.marker).write_text(str(torch.get_num_threads()))
        return Regression()


@pytest.mark.workers
def test_a_group_trains_one_model_after_another_in_the_same_process(
    ray_session: None, tmp_path: Path, monitor: Monitor
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    groups, marker, resources = Groups(), str(tmp_path / "processes"), WorkerResources(workers=1, max_failures=1)
    alone = Output(str(tmp_path / "alone"))
    train(Output(str(tmp_path / "first")), Counting(marker=marker), config(), 0, resources, monitor, groups)
    with pytest.raises(UserError, match="no such layer"):
        train(Output(str(tmp_path / "wrong")), Mistaken(marker=marker), config(), 0, resources, monitor, groups)
    train(Output(str(tmp_path / "second")), Counting(marker=marker), config(), 1, resources, monitor, groups)
    first, _, second = Path(marker).read_text().splitlines()
    assert first == second
    killed = RegressionTask(fail_at=2, killed=True, marker=str(tmp_path / "failed"))  # the group starts again, in this job
    train(Output(str(tmp_path / "killed")), killed, config(), 1, resources, monitor, groups)
    train(alone, RegressionTask(), config(), 1, LOCAL, monitor)
    for name in ("second", "killed"):
        assert losses(Output(str(tmp_path / name))) == pytest.approx(losses(alone))
    assert groups.waiting(resources)
    assert groups.worth(resources, 0)
    assert not groups.worth(resources, 1), "these few steps are shorter than a start"
    groups.made[0].longest[resources.cpus] = 2.1 * groups.made[0].start
    assert groups.worth(resources, 1)
    groups.keep([])
    assert not groups.waiting(resources)


@pytest.mark.workers
def test_workers_that_wait_on_a_ray_of_their_own_take_nothing_from_others(
    ray_session: None, tmp_path: Path, monitor: Monitor
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    groups, marker, resources = Groups(shared=False), str(tmp_path / "threads"), WorkerResources(workers=1, cpus=2)
    assert groups.reserve(WorkerResources(gpus=1))
    train(Output(str(tmp_path / "out")), Threads(marker=marker), config(), 0, resources, monitor, groups)
    assert Path(marker).read_text() == "2"
    other = WorkerResources(workers=1, cpus=1)
    assert all(map(groups.waiting, (resources, other)))
    assert not groups.waiting(WorkerResources(workers=2))
    groups.made[0].longest[resources.cpus] = 2.1 * groups.made[0].start
    assert groups.worth(resources, 1)
    assert not groups.worth(other, 1), "no job of one thread was long"
    train(Output(str(tmp_path / "other")), Threads(marker=marker), config(), 0, other, monitor, groups)
    assert (Path(marker).read_text(), len(groups.made)) == ("1", 1), "the same workers, with one thread"
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]  # others may want them all
    groups.keep([])


@pytest.mark.workers
def test_a_users_mistake_reaches_the_driver_at_once(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    built = tmp_path / "built"
    with pytest.raises(UserError, match="no such layer"):
        train(Output(str(tmp_path / "out")), Mistaken(marker=str(built)), config(), 0, WorkerResources(workers=2), monitor)
    assert built.read_text().splitlines() == ["built"] * 2  # once a worker


@pytest.mark.workers
@pytest.mark.slow
def test_a_cut_off_run_goes_on_with_other_workers_from_the_weights_alone(
    ray_session: None, tmp_path: Path, monitor: Recorder
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    output = Output(str(tmp_path / "out"))

    def go_on(task: RegressionTask, workers: int, failures: int = 0, **changes: Any) -> dict[str, float]:
        return train(output, task, config(), 0, WorkerResources(workers=workers, max_failures=failures, **changes), monitor)

    with pytest.raises(Exception, match="gave up"):
        go_on(RegressionTask(fail_at=2, marker=str(tmp_path / "first")), 1)
    with pytest.raises(UserError, match=r"began with 1 worker.*on_changed_world: weights"):
        go_on(RegressionTask(), 2)
    failing = RegressionTask(fail_at=1, marker=str(tmp_path / "second"))  # before there is a checkpoint of two workers
    assert go_on(failing, 2, failures=1, on_changed_world="weights")["step"] == 30
    assert (tmp_path / "second").exists()
    assert monitor.resumed == 10
    training = output.read_json(TRAINING)
    assert (training["workers"], training["resumed_from_weights"]) == (2, [10])
    assert [json.loads(line)["step"] for line in output.read_bytes(METRICS).splitlines()] == [10, 20, 30]
    assert losses(output)[30] < losses(output)[10]


@pytest.mark.workers
@pytest.mark.slow  # a killed worker of a group is in the test of groups, one of a stage in test_align.py
def test_a_killed_worker_goes_on_from_its_checkpoint(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    whole, broken = Output(str(tmp_path / "whole")), Output(str(tmp_path / "broken"))
    midway = config(checkpoint_every=7)  # an epoch is 5 steps
    train(whole, RegressionTask(), midway, 0, LOCAL, monitor)
    failing = RegressionTask(fail_at=2, killed=True, marker=str(tmp_path / "failed"))
    train(broken, failing, midway, 0, WorkerResources(workers=1, max_failures=1), monitor)
    assert (tmp_path / "failed").exists()
    assert losses(broken) == pytest.approx(losses(whole))
    assert torch.equal(load(broken.read_bytes(WEIGHTS))["line.weight"], load(whole.read_bytes(WEIGHTS))["line.weight"])


@pytest.mark.parametrize(
    ("losses", "flagged"),
    [
        ([3.0, 2.0, 1.0], False),
        ([3.0, 3.1], True),
        ([3.0], False),
        ([1.0] * 4 + [0.99] * 8, True),
        ([8.0, *[2.0] * 9, 2.1], False),
    ],
)
def test_a_loss_that_does_not_fall_is_flagged(tmp_path: Path, losses: list[float], flagged: bool) -> None:
    output = Output(str(tmp_path))
    lines = [json.dumps({"step": 10 * step, "loss": loss}) for step, loss in enumerate(losses, 1)]
    output.write_bytes(METRICS, "\n".join(lines).encode())
    assert [said.partition(":")[0] for said in unlearned(output)] == ["the loss did not fall"] * flagged
