"""One training loop for alignment, instruction and composed retrieval: Ray Train workers running DeepSpeed.

A model package gives a `Task`; the loop owns sampling, precision, accumulation, validation, the best checkpoint, resume
and reporting. The rows of a global batch depend on (seed, step) alone; what a task draws for them on (seed, step, rank,
micro-batch), dropout on (seed, step, rank). So a resumed run sees what an uninterrupted one would, and another number of
workers sees the same rows with other draws.
"""

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
from typing_extensions import TypedDict

from cluster.artifacts import Output
from cluster.config import TrainingConfig, WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.provenance import record_environment
from cluster.training.checkpoints import (
    BEST,
    CHECKPOINTS,
    WEIGHTS,
    State,
    check_world,
    cut_off,
    latest,
    read_state,
    resume,
    save_checkpoint,
)
from cluster.training.engine import build_engine, forward_backward, process_group
from cluster.training.groups import Groups

METRICS = "metrics.jsonl"  # one line {"step", name: value, ...} a report
TRAINING = "training.json"  # workers of the last checkpoint, steps at which it went on from the weights alone, best report
LOG_EVERY = 10
LOCAL = threading.Lock()  # one training at a time in the driver: it has one process group and one torch


class Finished(TypedDict):
    """What `TRAINING` says."""

    workers: int
    resumed_from_weights: list[int]
    best: dict[str, float]


LEAST_FALL = 0.02  # of the loss, as a share of its first values: a training whose loss falls less has learned nothing


class Task(Protocol):
    """What a model package gives the loop. Pickled to the workers: it holds settings and paths, and loads lazily."""

    @property
    def best_metric(self) -> str | None:
        """Validation metric to maximise; None keeps the last checkpoint."""

    @property
    def size(self) -> int:
        """Number of training rows: the length of an epoch."""

    def build(self) -> Any:
        """The torch module; parameters that require a gradient are trained and saved.

        `module(batch)` gives a dict of scalar tensors, of which "loss" is minimised. A UserError reaches the driver.
        """

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Inputs of `rows` (positions below `size`); what is random about them comes from `rng`."""

    def validate(self, module: Any) -> dict[str, float]:
        """Metrics on held-out rows; empty where there are none."""


def sample_rows(size: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Rows of the global batch at `step`: consecutive in a permutation of (seed, epoch). Shape [batch]."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // size
    return np.concatenate([_permutation(size, seed, e)[positions[epochs == e] % size] for e in np.unique(epochs)])


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def train(
    output: Output,
    task: Task,
    config: TrainingConfig,
    seed: int,
    resources: WorkerResources,
    monitor: Monitor,
    groups: Groups | None = None,
) -> dict[str, float]:
    """Train on Ray Train workers and keep the best weights in `output`. Returns the best checkpoint's metrics.

    A run that was cut off goes on from its last checkpoint, and one that was cut off after its last step is not done again.
    The workers are of `groups`, and stay for the next training; without it they end with this one.
    Raises UserError when the number of workers changed, and what `task.build` finds wrong.
    """
    config.accumulation(max(resources.workers, 1))
    if output.exists(TRAINING):
        return _finished(output)
    if begun := cut_off(output):
        check_world(output, begun["workers"], resources)
    done = begun["step"] if begun else 0
    monitor.start(config.steps, "step", done)
    job, heard = partial(_train, output, task, config, seed), partial(_pass_on, monitor, [done])
    if resources.workers:
        with nullcontext(groups) if groups else Groups() as mine, mine.take(resources, output) as group:
            group.train(job, resources.cpus, heard)
    else:
        with LOCAL, process_group():
            job(heard)
    last = latest(output)
    assert last is not None, "the last step is always a checkpoint"
    state = read_state(output, last)
    output.write_bytes(WEIGHTS, output.read_bytes(f"{last}/{BEST}"))
    output.write_bytes(METRICS, "\n".join(map(json.dumps, state["reports"])).encode())
    output.write_json(TRAINING, {name: value for name, value in state.items() if name in Finished.__annotations__})
    return _finished(output)


def _pass_on(monitor: Monitor, reached: list[int], report: dict[str, float]) -> None:
    """Tell the monitor of a report. `reached`: the last step it knows of, which a worker that started again may repeat."""
    step = int(report["step"])
    if len(report) > 1:
        monitor.metrics(step, {name: value for name, value in report.items() if name != "step"})
    monitor.advance(max(step - reached[0], 0))
    reached[0] = max(reached[0], step)


def _finished(output: Output) -> dict[str, float]:
    """The best report of a training that has written all it makes; its checkpoints go."""
    system, base = output.location
    if output.exists(CHECKPOINTS):
        system.delete_dir(f"{base}/{CHECKPOINTS}")
    finished: Finished = output.read_json(TRAINING, Finished)
    return finished["best"]


def reports_of(output: Output) -> list[dict[str, float]]:
    """The reports of a training, as they came."""
    try:
        return [json.loads(line) for line in output.read_bytes(METRICS).splitlines()]
    except ValueError as error:
        raise output.damaged(METRICS, error) from error


def unlearned(output: Output) -> list[str]:
    """What is odd about a training whose loss did not fall, from the first quarter of its reports to the last; else nothing."""
    reports = reports_of(output)
    quarter = max(len(reports) // 4, 1)
    first, last = (float(np.mean([report["loss"] for report in some])) for some in (reports[:quarter], reports[-quarter:]))
    if len(reports) < 2 or last < (1 - LEAST_FALL) * first:
        return []
    return [
        f"the loss did not fall: {first:.3f} at step {int(reports[0]['step'])}, {last:.3f} at step {int(reports[-1]['step'])}; "
        "the model may have learned nothing: look at the learning rate, the number of steps and the texts"
    ]


def _train(output: Output, task: Task, config: TrainingConfig, seed: int, report: Callable[[dict[str, float]], None]) -> None:
    """The loop of one rank."""
    import torch

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    record_environment(output, config.precision)
    with ThreadPoolExecutor(1) as prefetcher:
        torch.manual_seed(seed)
        module = _on_every_rank(partial(_build, task, config))
        engine, state = resume(output, module, partial(build_engine, module, config, world), world)
        batches, begun = partial(_micro_batches, task, config, seed, rank, world), state["step"]
        upcoming = prefetcher.submit(batches, begun)
        # not `torch.manual_seed`: of each kind of accelerator that is not there it takes down the stack, 0.7 ms a step
        generators = (torch.default_generator, *torch.cuda.default_generators)
        for step in range(begun, config.steps):
            current = upcoming.result()
            upcoming = prefetcher.submit(batches, min(step + 1, config.steps - 1))
            for generator in generators:
                generator.manual_seed(stable_seed(seed, step, rank))
            losses = [forward_backward(engine, batch) for batch in current]
            state["step"] = step + 1
            _stop(_not_finite(losses), engine, state["step"])
            found = _report(engine, output, task, config, losses, state)
            if rank == 0 and (found or step == begun):  # the first step shows that the work has begun
                report(found or {"step": step + 1})


def _on_every_rank(build: Callable[[], Any]) -> Any:
    """What `build` gives. Raises the first UserError of any rank on all: a rank alone would wait for the others forever."""
    import torch.distributed as dist

    try:
        built, mistake = build(), None
    except UserError as error:
        built, mistake = None, error
    group: Any = dist.new_group(backend="gloo")  # NCCL has no device before DeepSpeed starts
    mistakes: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake, group)
    for found in mistakes:
        if found is not None:
            raise found
    return built


def stable_seed(*parts: int) -> int:
    """A 31-bit seed from several numbers."""
    return int(np.random.default_rng(list(parts)).integers(2**31))


def _micro_batches(task: Task, config: TrainingConfig, seed: int, rank: int, world: int, step: int) -> list[dict[str, Any]]:
    micro, accumulation = config.accumulation(world)
    rows = sample_rows(task.size, config.batch_size, step, seed).reshape(accumulation, world, micro)[:, rank]
    return [task.batch(r, np.random.default_rng([seed, step, rank, i])) for i, r in enumerate(rows)]


def _build(task: Task, config: TrainingConfig) -> Any:
    module = task.build()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for prefix in config.learning_rates:
        if not any(name.startswith(prefix) for name in names):
            begin = sorted({name.partition(".")[0] for name in names})
            raise UserError(f"training.learning_rates: '{prefix}' begins no trained parameter's name; they begin with {begin}")
    return module


def _report(
    engine: Any, output: Output, task: Task, config: TrainingConfig, losses: list[dict[str, float]], state: State
) -> dict[str, float] | None:
    """The step's report where one is due; makes a checkpoint where one is. Every rank comes here at every step."""
    step = state["step"]
    checkpoint = step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0)
    if not checkpoint and step % LOG_EVERY:
        return None
    report = {"step": step, **_mean_over_ranks(losses, engine.device), **(_validate(engine, task) if checkpoint else {})}
    state["reports"].append(report)
    if checkpoint:
        _stop(None if _has_finite_weights(engine) else "the weights are not finite", engine, step)
        save_checkpoint(engine, output, task.best_metric, state)
    return report


def _not_finite(losses: list[dict[str, float]]) -> str | None:
    """Names a loss that is not finite. A gradient that is not makes weights and the next step's loss such."""
    return next((f"{name} is {value}" for loss in losses for name, value in loss.items() if not math.isfinite(value)), None)


def _has_finite_weights(engine: Any) -> bool:
    trained = (weight for weight in engine.module.parameters() if weight.requires_grad)
    return all(bool(getattr(weight, "ds_tensor", weight).isfinite().all()) for weight in trained)  # ZeRO-3: this rank's share


def _stop(wrong: str | None, engine: Any, step: int) -> None:
    """Raises UserError on all ranks when something is wrong on any: every later step would train on it."""
    import torch

    flag = torch.tensor(float(wrong is not None), device=engine.device)
    torch.distributed.all_reduce(flag)
    if flag.item():
        found = wrong or "what another worker has is not finite"
        raise UserError(f"training: step {step}: {found}; lower learning_rate, set gradient_clip, or take precision fp32")


def _mean_over_ranks(losses: list[dict[str, float]], device: Any) -> dict[str, float]:
    """Means over the global batch of the losses of its micro-batches."""
    import torch

    means = torch.tensor([list(loss.values()) for loss in losses], dtype=torch.float64).mean(0).to(device)
    torch.distributed.all_reduce(means)
    return dict(zip(losses[0], (means / torch.distributed.get_world_size()).tolist(), strict=True))


def _validate(engine: Any, task: Task) -> dict[str, float]:
    import torch

    engine.eval()
    with torch.no_grad():
        metrics = task.validate(engine.module)
    engine.train()
    return metrics


def unfit(field: str, training: TrainingConfig, resources: WorkerResources) -> dict[str, str]:
    """What `Stage.check` says of a training whose batch does not divide over its workers."""
    try:
        training.accumulation(max(resources.workers, 1))
    except UserError as error:
        return {field: str(error)}
    return {}
