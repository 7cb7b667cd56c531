"""One training loop for alignment, instruction and composed retrieval: Ray Train workers running DeepSpeed.

A model package gives a `Task`; the loop owns sampling, precision, accumulation, validation, the best checkpoint, resume
and reporting. The rows of a global batch depend on (seed, step) alone; what a task draws for them on (seed, step, rank,
micro-batch), dropout on (seed, step, rank). So a resumed run sees what an uninterrupted one would, and another number of
workers sees the same rows with other draws.
"""

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.artifacts import Output, filesystem
from cluster.config import TrainingConfig, WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.provenance import record_environment
from cluster.training.checkpoints import BEST, WEIGHTS, State, check_world, cut_off, read_state, resume, save_checkpoint
from cluster.training.engine import build_engine, forward_backward, process_group

METRICS = "metrics.jsonl"  # one line {"step", name: value, ...} a report
TRAINING = "training.json"  # workers of the last checkpoint, steps at which it went on from the weights alone, best report
LOG_EVERY = 10


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
    with process_group(arguments["local"]), ThreadPoolExecutor(1) as prefetcher:
        torch.manual_seed(seed)
        module = _on_every_rank(partial(_build, task, config))
        engine, state = resume(module, partial(build_engine, module, config, world), world)
        batches = partial(_micro_batches, task, config, seed, rank, world)
        upcoming = prefetcher.submit(batches, state["step"])
        for step in range(state["step"], config.steps):
            current = upcoming.result()
            upcoming = prefetcher.submit(batches, min(step + 1, config.steps - 1))
            torch.manual_seed(stable_seed(seed, step, rank))
            losses = [forward_backward(engine, batch) for batch in current]
            state["step"] = step + 1
            _check_finite(losses, state["step"], engine.device)
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


def _build(task: Task, config: TrainingConfig) -> Any:
    module = task.build()
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for prefix in config.learning_rates:
        if not any(name.startswith(prefix) for name in names):
            begin = sorted({name.partition(".")[0] for name in names})
            raise UserError(f"training.learning_rates: '{prefix}' begins no trained parameter's name; they begin with {begin}")
    return module


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


def _check_finite(losses: list[dict[str, float]], step: int, device: Any) -> None:
    """Raises UserError on all ranks when a loss of any is not finite: every later step would train on it."""
    import torch

    wrong = next((f"{name} is {value}" for loss in losses for name, value in loss.items() if not math.isfinite(value)), None)
    flag = torch.tensor(float(wrong is not None), device=device)
    torch.distributed.all_reduce(flag)
    if flag.item():
        found = wrong or "another worker's loss is not finite"
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
