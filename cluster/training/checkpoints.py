"""The checkpoints of a training: what it goes on from, and the weights it keeps."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from cluster.artifacts import Output, filesystem
from cluster.config import WorkerResources
from cluster.errors import UserError

WEIGHTS = "weights.safetensors"  # every trained parameter: in an output of the best step, in a checkpoint of its own
BEST = "best.safetensors"  # in a checkpoint: the trained parameters of the best step so far
STATE = "state.json"  # in a checkpoint: the `State` it was made in


class State(TypedDict):
    """What a checkpoint says of its run."""

    step: int
    workers: int
    resumed_from_weights: list[int]  # steps at which the optimizer began afresh
    reports: list[dict[str, float]]  # all so far
    best: dict[str, float]  # the report of the best step


def read_state(folder: str) -> State:
    """The state that the checkpoint in a folder was made in."""
    state: State = json.loads((Path(folder) / STATE).read_text())
    return state


def cut_off(output: Output) -> State | None:
    """The state of the last checkpoint of a run that did not finish. Raises UserError when nobody can tell which it is."""
    import ray.train
    from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError

    system, base = filesystem(output.uri)
    try:
        checkpoint = ray.train.Result.from_path(f"{base}/checkpoints", system).checkpoint
    except RuntimeError:  # the run did not come to a checkpoint
        return None
    except CheckpointManagerInitializationError as error:
        raise UserError(
            f"{output.path('checkpoints')}: the list of checkpoints is broken, by a kill or a full disk at the moment it was "
            f"written, or is another Ray version's ({error}); remove this folder to train from the start"
        ) from error
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return read_state(folder)


def check_world(output: Output, before: int, resources: WorkerResources) -> None:
    """ZeRO checkpoints are tied to the number of workers: only the weights can go over to another number."""
    if not resources.workers:
        raise UserError(
            f"{output.uri}: training began with {before} worker(s), and workers: 0 keeps no checkpoint to go on from; go back "
            f"to workers: {before}, or remove {output.path('checkpoints')} to train from the start"
        )
    if before != resources.workers and resources.on_changed_world == "error":
        raise UserError(
            f"{output.uri}: training began with {before} worker(s), its resources now say {resources.workers}; go back to "
            f"workers: {before}, or set on_changed_world: weights beside it to go on from the weights with a fresh optimizer"
        )


def resume(module: Any, build: Callable[[], Any], world: int) -> tuple[Any, State]:
    """The module's DeepSpeed engine, made by `build`, and the state to go on from, of the last checkpoint if any."""
    import ray.train
    from safetensors.torch import load_file

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return build(), State(step=0, workers=world, resumed_from_weights=[], reports=[], best={})
    with checkpoint.as_directory() as folder:
        state = read_state(folder)
        if state["workers"] == world:
            engine = build()
            engine.load_checkpoint(folder, tag="zero", load_module_strict=False)
            return engine, state
        load_trained(module, load_file(Path(folder) / WEIGHTS))
    engine = build()
    for _ in range(state["step"]):
        engine.lr_scheduler.step()
    return engine, {**state, "workers": world, "resumed_from_weights": [*state["resumed_from_weights"], state["step"]]}


def load_trained(module: Any, weights: dict[str, Any]) -> None:
    """Put saved weights into a module. Raises ValueError when they are not exactly its trained parameters."""
    expected = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if expected != set(weights):
        raise ValueError(f"checkpoint and model differ in {sorted(expected ^ set(weights))[:5]}")
    module.load_state_dict(weights, strict=False)


def save_checkpoint(engine: Any, best_metric: str | None, state: State, local: bool) -> None:
    """Save and report. A barrier: every rank comes here at the same steps."""
    import ray.train

    folder = Path(tempfile.mkdtemp())
    engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)
    _save_weights(engine, folder)
    if engine.global_rank == 0:
        state["best"] = _keep_best(folder, best_metric, state["reports"][-1])
        (folder / STATE).write_text(json.dumps(state))
    ray.train.report(state["reports"][-1], checkpoint=ray.train.Checkpoint.from_directory(folder))
    if not local:  # local mode leaves the checkpoint in this folder
        shutil.rmtree(folder)


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
            best = read_state(before)["best"]
            if _or_worst(best[metric]) >= _or_worst(report[metric]):
                shutil.copy(Path(before) / BEST, folder / BEST)
                return best
    shutil.copy(folder / WEIGHTS, folder / BEST)
    return report


def _or_worst(value: float) -> float:
    """NaN, of a training that diverged, is less than any value."""
    return -math.inf if math.isnan(value) else value
