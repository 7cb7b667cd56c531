"""One training loop for alignment, instruction and composed retrieval: Ray Train workers running DeepSpeed.

A model package gives a `Task`; the loop owns sampling, precision, accumulation, validation, the best checkpoint, resume
and reporting. The rows of a global batch depend on (seed, step) alone; what a task draws for them on (seed, step, rank,
micro-batch), dropout on (seed, step, rank). So a resumed run sees what an uninterrupted one would, and another number of
workers sees the same rows with other draws.
"""

import json
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from cluster.artifacts import Output, filesystem
from cluster.checkpoints import BEST, WEIGHTS, State, check_world, cut_off, read_state, resume, save_checkpoint
from cluster.config import Section, WorkerResources
from cluster.devices import uses_bf16
from cluster.environment import record_environment
from cluster.errors import UserError
from cluster.monitor import Monitor

METRICS = "metrics.jsonl"  # one line {"step", name: value, ...} a report
TRAINING = "training.json"  # workers of the last checkpoint, steps at which it went on from the weights alone, best report
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
    zero_stage: Literal[1, 2, 3] = Field(2, description="what workers share out: 1 optimizer, 2 gradients too, 3 weights too")
    checkpoint_every: int | None = Field(None, gt=0, description="steps between validated checkpoints; None: at the end")

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

    A run that was cut off goes on from its last checkpoint, and one that was cut off after its last step is not done again.
    Raises UserError when the number of workers changed, and what `task.build` finds wrong.
    """
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config.accumulation(max(resources.workers, 1))
    if output.exists(TRAINING):
        return _finished(output)
    system, base = filesystem(output.uri)
    system.create_dir(base, recursive=True)
    if begun := cut_off(output):
        check_world(output, begun["workers"], resources)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # it lives as long as the driver
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "output": output,
            "task": task,
            "config": config,
            "seed": seed,
            "queue": queue,
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
    done = begun["step"] if begun else 0
    monitor.start(config.steps, "step", done)
    with _draining(queue, monitor, done), _interruptible():
        result: Any = trainer.fit()
    if isinstance(result.return_value, UserError):
        raise result.return_value
    assert result.checkpoint is not None, "the last step is always a checkpoint"
    with result.checkpoint.as_directory() as folder:
        state = read_state(folder)
        output.write_bytes(WEIGHTS, (Path(folder) / BEST).read_bytes())
    output.write_bytes(METRICS, "\n".join(map(json.dumps, state["reports"])).encode())
    output.write_json(TRAINING, {name: state[name] for name in ("workers", "resumed_from_weights", "best")})
    return _finished(output)


def _finished(output: Output) -> dict[str, float]:
    """The best report of a training that has written all it makes; its checkpoints go."""
    system, base = filesystem(output.uri)
    if output.exists("checkpoints"):
        system.delete_dir(f"{base}/checkpoints")
    best: dict[str, float] = output.read_json(TRAINING)["best"]
    return best


def reports_of(output: Output) -> list[dict[str, float]]:
    """The reports of a training, as they came."""
    return [json.loads(line) for line in output.read_bytes(METRICS).splitlines()]


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


@contextmanager
def _draining(queue: Any, monitor: Monitor, reached: int) -> Iterator[None]:
    """Pass the workers' reports to the monitor while training runs. `reached`: the step it goes on from."""
    stop = threading.Event()

    def drain() -> None:
        nonlocal reached
        while not (stop.is_set() and queue.empty()):
            for report in queue.get_nowait_batch(queue.qsize()):
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
        queue.shutdown()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C: Ray Train's handler ends the process as if it had succeeded, and outlives the training."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        raise KeyboardInterrupt from end
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def _worker(arguments: dict[str, Any]) -> Any:
    """The loop of one rank. Returns a user's mistake: raised, it would make Ray Train start over."""
    try:
        _train(arguments)
    except UserError as error:
        return error
    return None


def _train(arguments: dict[str, Any]) -> None:
    import ray.train
    import torch

    task, config, seed = arguments["task"], arguments["config"], arguments["seed"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    record_environment(arguments["output"], config.precision)
    with _process_group(arguments["local"]), ThreadPoolExecutor(1) as prefetcher:
        torch.manual_seed(seed)
        module = _on_every_rank(partial(_build, task, config))
        engine, state = resume(module, partial(_engine, module, config, world), world)
        batches = partial(_micro_batches, task, config, seed, rank, world)
        upcoming = prefetcher.submit(batches, state["step"])
        for step in range(state["step"], config.steps):
            current = upcoming.result()
            upcoming = prefetcher.submit(batches, min(step + 1, config.steps - 1))
            torch.manual_seed(stable_seed(seed, step, rank))
            losses = [_forward_backward(engine, batch) for batch in current]
            state["step"] = step + 1
            _report(engine, task, losses, state, arguments)


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


def _forward_backward(engine: Any, batch: dict[str, Any]) -> dict[str, float]:
    losses = engine(_to(batch, engine.device))
    engine.backward(losses["loss"])
    engine.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def _to(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {name: value.to(device, non_blocking=True) if hasattr(value, "to") else value for name, value in batch.items()}


def _build(task: Task, config: TrainingConfig) -> Any:
    module = task.build()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for prefix in config.learning_rates:
        if not any(name.startswith(prefix) for name in names):
            begin = sorted({name.partition(".")[0] for name in names})
            raise UserError(f"training.learning_rates: '{prefix}' begins no trained parameter's name; they begin with {begin}")
    return module


def _engine(module: Any, config: TrainingConfig, world: int) -> Any:
    """A DeepSpeed engine around the module, with one parameter group a learning rate."""
    import deepspeed
    import torch

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


def _report(engine: Any, task: Task, losses: list[dict[str, float]], state: State, arguments: dict[str, Any]) -> None:
    """Report the step's losses where one is due, and make a checkpoint where one is. Every rank comes here at every step."""
    step, config = state["step"], arguments["config"]
    checkpoint = step == config.steps or (config.checkpoint_every and step % config.checkpoint_every == 0)
    if not checkpoint and step % LOG_EVERY:
        return
    report = {"step": step, **_mean_over_ranks(losses, engine.device), **(_validate(engine, task) if checkpoint else {})}
    state["reports"].append(report)
    if engine.global_rank == 0:
        arguments["queue"].put(report)
    if checkpoint:
        save_checkpoint(engine, task.best_metric, state, arguments["local"])


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


@contextmanager
def _process_group(local: bool) -> Iterator[None]:
    """Local mode has no process group: open one for DeepSpeed, and take it down so that the next run can open its own."""
    import deepspeed
    import torch

    # on CPU gloo does the same work: DeepSpeed's own shared-memory op would be compiled for a minute first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not local:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            if deepspeed.comm.is_initialized():
                deepspeed.comm.destroy_process_group()
                deepspeed.comm.comm.cdb = None
            else:  # the model could not be built
                torch.distributed.destroy_process_group()
