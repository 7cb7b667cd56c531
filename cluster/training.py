"""One training loop for alignment, instruction and composed retrieval: Ray Train workers running DeepSpeed.

A model package gives a `Task`; the loop owns sampling, precision, accumulation, validation, the best checkpoint, resume
and reporting. Batches depend on (seed, step) alone, so a resumed run sees what an uninterrupted one would.
"""

import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from cluster.artifacts import Output, filesystem
from cluster.config import Section, WorkerResources
from cluster.devices import uses_bf16
from cluster.errors import UserError
from cluster.monitor import Monitor

WEIGHTS = "weights.safetensors"  # every trained parameter: in an output of the best step, in a checkpoint of its own
BEST = "best.safetensors"  # in a checkpoint: the trained parameters of the best step so far
STATE = "state.json"  # in a checkpoint: its step and the best step's metrics
METRICS = "metrics.jsonl"  # one line {"step", name: value, ...} a report
LOG_EVERY = 10


class TrainingConfig(Section):
    """How a model is trained. The global batch is stated; the micro-batch follows from the workers unless given."""

    steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(gt=0, description="global batch, over all workers")
    micro_batch: int | None = Field(None, gt=0, description="rows a worker and forward pass; None: no accumulation")
    learning_rate: float = Field(gt=0)
    learning_rates: dict[str, float] = Field({}, description="other rates, by prefix of the parameter's name")
    schedule: Literal["constant", "cosine", "tenth_after_half"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.05, ge=0)
    gradient_clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: any")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="auto: bf16 where the processor is fast at it")
    zero_stage: Literal[1, 2, 3] = 2
    checkpoint_every: int | None = Field(None, gt=0, description="steps between validated checkpoints; None: at the end")
    on_changed_world: Literal["error", "weights"] = Field(
        "error", description="resume with another number of workers: refuse, or go on from the weights alone"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self

    def accumulation(self, world: int) -> tuple[int, int]:
        """(micro-batch, accumulation steps) for a number of workers. Raises UserError when they do not divide."""
        micro = self.micro_batch or self.batch_size // world
        steps, rest = divmod(self.batch_size, max(micro, 1) * world)
        if rest or not micro:
            raise UserError(f"batch_size {self.batch_size} is no multiple of {world} worker(s) x micro_batch {micro}")
        return micro, steps


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

        `module(batch)` gives a dict of scalar tensors, of which "loss" is minimised.
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


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the full learning rate at `step`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return 0.1 if config.schedule == "tenth_after_half" and step >= config.steps // 2 else 1.0


def train(
    output: Output, task: Task, config: TrainingConfig, seed: int, resources: WorkerResources, monitor: Monitor
) -> dict[str, float]:
    """Train on Ray Train workers and keep the best weights in `output`. Returns the best checkpoint's metrics.

    A run that was cut off goes on from its last checkpoint. Raises UserError when the number of workers changed.
    """
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue

    world = max(resources.workers, 1)
    config.accumulation(world)
    weights_only = _check_world(output, world, config)
    system, base = filesystem(output.uri)
    system.create_dir(base, recursive=True)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "task": task,
            "config": config,
            "seed": seed,
            "queue": queue,
            "weights_only": weights_only,
            "local": resources.workers == 0,
        },
        scaling_config=_scaling(resources),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=base,
            storage_filesystem=system,
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    monitor.start(config.steps, "step")
    with _draining(queue, output, monitor):
        result = trainer.fit()
    assert result.checkpoint is not None, "the last step is always a checkpoint"
    with result.checkpoint.as_directory() as folder:
        output.write_bytes(WEIGHTS, (Path(folder) / BEST).read_bytes())
        metrics = json.loads((Path(folder) / STATE).read_text())["best"]
    if output.exists("checkpoints"):
        system.delete_dir(f"{base}/checkpoints")
    return metrics


def _scaling(resources: WorkerResources) -> Any:
    import ray.train

    wanted = {"CPU": resources.cpus}
    if resources.gpus:
        wanted["GPU"] = resources.gpus
    if resources.memory_gb:
        wanted["memory"] = int(resources.memory_gb * 2**30)
    return ray.train.ScalingConfig(
        num_workers=resources.workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker=wanted,
        accelerator_type=resources.accelerator_type,
    )


def _check_world(output: Output, world: int, config: TrainingConfig) -> bool:
    """Whether to resume from the weights alone. ZeRO checkpoints are tied to the number of workers."""
    before = output.read_json("training.json")["workers"] if output.exists("training.json") else world
    if before != world and config.on_changed_world == "error":
        raise UserError(
            f"{output.uri}: training began with {before} worker(s), the config now says {world}; go back to {before}, or set "
            "on_changed_world=weights to go on from the weights with a fresh optimiser"
        )
    output.write_json("training.json", {"workers": world, "resumed_from_weights": before != world})
    return before != world


@contextmanager
def _draining(queue: Any, output: Output, monitor: Monitor) -> Iterator[None]:
    """Pass the workers' reports to the monitor while training runs, and keep them in `metrics.jsonl`."""
    lines = output.read_bytes(METRICS).decode().splitlines() if output.exists(METRICS) else []
    stop = threading.Event()
    reached = 0

    def drain() -> None:
        nonlocal reached
        while not (stop.is_set() and queue.empty()):
            for report in queue.get_nowait_batch(queue.qsize()):
                lines.append(json.dumps(report))
                monitor.metrics(report["step"], {name: value for name, value in report.items() if name != "step"})
                monitor.advance(max(report["step"] - reached, 0))
                reached = max(reached, report["step"])
            stop.wait(0.5)

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        output.write_bytes(METRICS, "\n".join(lines).encode())
        queue.shutdown()


def _worker(arguments: dict[str, Any]) -> None:
    """The loop of one rank."""
    import ray.train
    import torch

    task, config, seed = arguments["task"], arguments["config"], arguments["seed"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with _process_group(arguments["local"]), ThreadPoolExecutor(1) as prefetcher:
        torch.manual_seed(seed)
        engine = _engine(task.build(), config, world)
        step = _resume(engine, arguments["weights_only"])
        batches = partial(_micro_batches, task, config, seed, rank, world)
        upcoming = prefetcher.submit(batches, step)
        while step < config.steps:
            current = upcoming.result()
            upcoming = prefetcher.submit(batches, min(step + 1, config.steps - 1))
            torch.manual_seed(stable_seed(seed, step, rank))
            losses = [_forward_backward(engine, batch) for batch in current]
            step += 1
            report = {name: float(np.mean([loss[name] for loss in losses])) for name in losses[0]}
            if step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0):
                _checkpoint(engine, task, step, report, arguments)
            elif rank == 0 and step % LOG_EVERY == 0:
                arguments["queue"].put({"step": step, **report})


def stable_seed(*parts: int) -> int:
    """A 31-bit seed from several numbers."""
    return int(np.random.default_rng(list(parts)).integers(2**31))


def _micro_batches(task: Task, config: TrainingConfig, seed: int, rank: int, world: int, step: int) -> list[dict[str, Any]]:
    micro, accumulation = config.accumulation(world)
    rows = sample_rows(task.size, config.batch_size, step, seed).reshape(accumulation, world, micro)[:, rank]
    return [task.batch(r, np.random.default_rng([seed, step, rank, i])) for i, r in enumerate(rows)]


def _forward_backward(engine: Any, batch: dict[str, Any]) -> dict[str, float]:
    losses = engine(_to(batch, engine.device))
    engine.backward(losses["loss"])
    engine.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def _to(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device, non_blocking=True) if hasattr(value, "to") else value for name, value in batch.items()}


def _engine(module: Any, config: TrainingConfig, world: int) -> Any:
    """A DeepSpeed engine around the module, with one parameter group a learning rate."""
    import deepspeed
    import torch

    # on CPU gloo does the same work: DeepSpeed's own shared-memory op would be compiled for a minute first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups: dict[float, list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rates = [rate for prefix, rate in config.learning_rates.items() if name.startswith(prefix)]
            groups.setdefault(rates[0] if rates else config.learning_rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    micro, accumulation = config.accumulation(world)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, config)),
        config={
            "train_batch_size": config.batch_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": config.gradient_clip,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": uses_bf16(config.precision)},
            "steps_per_print": 2**31,
        },
    )
    return engine


def _resume(engine: Any, weights_only: bool) -> int:
    """Load the run's last checkpoint, if there is one. Returns the step to go on from."""
    import ray.train
    from safetensors.torch import load_file

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        step = json.loads((Path(folder) / STATE).read_text())["step"]
        if not weights_only:
            engine.load_checkpoint(folder, tag="zero", load_module_strict=False)
            return step
        load_trained(engine.module, load_file(Path(folder) / WEIGHTS))
        engine.optimizer.refresh_fp32_params()
        for _ in range(step):
            engine.lr_scheduler.step()
        return step


def load_trained(module: Any, weights: dict[str, Any]) -> None:
    """Put saved weights into a module. Raises ValueError when they are not exactly its trained parameters."""
    expected = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if expected != set(weights):
        raise ValueError(f"checkpoint and model differ in {sorted(expected ^ set(weights))[:5]}")
    module.load_state_dict(weights, strict=False)


def _checkpoint(engine: Any, task: Task, step: int, report: dict[str, float], arguments: dict[str, Any]) -> None:
    """Validate, save and report. A barrier: every rank comes here at the same steps."""
    import ray.train

    report = {**report, **_validate(engine, task)}
    if ray.train.get_context().get_world_rank() == 0:
        arguments["queue"].put({"step": step, **report})
    folder = Path(tempfile.mkdtemp())
    engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)
    _save_weights(engine, folder)
    if ray.train.get_context().get_world_rank() == 0:
        best = _keep_best(folder, task.best_metric, {"step": step, **report})
        (folder / STATE).write_text(json.dumps({"step": step, "best": best}))
    ray.train.report(report, checkpoint=ray.train.Checkpoint.from_directory(folder))
    if not arguments["local"]:  # local mode leaves the checkpoint in this folder
        shutil.rmtree(folder)


def _validate(engine: Any, task: Task) -> dict[str, float]:
    import torch

    engine.eval()
    with torch.no_grad():
        metrics = task.validate(engine.module)
    engine.train()
    return metrics


def _save_weights(engine: Any, folder: Path) -> None:
    """Rank 0 writes the trained weights, whole."""
    import deepspeed
    import torch
    from safetensors.torch import save_file

    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=engine.zero_optimization_partition_weights()):
        if torch.distributed.get_rank() == 0:
            save_file({name: p.detach().float().cpu().contiguous() for name, p in trained.items()}, folder / WEIGHTS)


def _keep_best(folder: Path, metric: str | None, report: dict[str, float]) -> dict[str, float]:
    """Carry the best weights so far from the last checkpoint into this one. Returns the best step's metrics."""
    import ray.train

    previous = ray.train.get_checkpoint()
    if previous is not None and metric is not None:
        with previous.as_directory() as before:
            best = json.loads((Path(before) / STATE).read_text())["best"]
            if best[metric] >= report[metric]:
                shutil.copy(Path(before) / BEST, folder / BEST)
                return best
    shutil.copy(folder / WEIGHTS, folder / BEST)
    return report


@contextmanager
def _process_group(local: bool) -> Iterator[None]:
    """Local mode has no process group: open one for DeepSpeed, and take it down so that the next run can open its own."""
    import deepspeed
    import torch

    if not local:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None
