"""The checkpoints of a training: what it goes on from, and the weights it keeps."""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired

from pyarrow import fs as pafs
from typing_extensions import TypedDict

from cluster.artifacts import Output
from cluster.config import WorkerResources
from cluster.errors import UserError

CHECKPOINTS = "checkpoints"  # folder of an output, while its training goes on: a folder each
WEIGHTS = "weights.safetensors"  # every trained parameter: in an output of the best step, in a checkpoint of its own
BEST = "best.safetensors"  # in a checkpoint: the trained parameters of the best step so far
STATE = "state.json"  # in a checkpoint: the `State` it was made in

_log = logging.getLogger(__name__)


class State(TypedDict):
    """What a checkpoint says of its run."""

    step: int
    workers: int
    resumed_from_weights: list[int]  # steps at which the optimizer began afresh
    reports: list[dict[str, float]]  # all so far
    best: dict[str, float]  # the report of the best step
    files: NotRequired[dict[str, str]]  # of the checkpoint, and the SHA-256 of each; earlier versions do not say


def latest(output: Output) -> str | None:
    """The folder of the last whole checkpoint of a training: its state is written last."""
    system, base = output.location
    found = system.get_file_info(pafs.FileSelector(f"{base}/{CHECKPOINTS}", allow_not_found=True))
    names = sorted((f"{CHECKPOINTS}/{folder.base_name}" for folder in found if not folder.is_file), reverse=True)
    return next((name for name in names if output.exists(f"{name}/{STATE}")), None)


def cut_off(output: Output) -> State | None:
    """The state of the last checkpoint of a run that did not finish. Others, and one that is damaged, are removed."""
    folder = latest(output)
    state = _whole(output, folder) if folder else None
    _remove_others(output, folder if state else None)
    return state


def _whole(output: Output, folder: str) -> State | None:
    try:
        state = read_state(output, folder)
        files = state.get("files", {})
        if output.hashes(list(files)) == files:
            return state
        why = "its files are not as they were written"
    except (UserError, FileNotFoundError) as error:
        why = str(error)
    _log.warning("%s: the checkpoint is damaged (%s); the training begins anew", output.path(folder), why)
    return None


def _remove_others(output: Output, kept: str | None) -> None:
    system, base = output.location
    for folder in system.get_file_info(pafs.FileSelector(f"{base}/{CHECKPOINTS}", allow_not_found=True)):
        if not folder.is_file and f"{CHECKPOINTS}/{folder.base_name}" != kept:
            system.delete_dir(folder.path)


def read_state(output: Output, folder: str) -> State:
    """The state of a checkpoint."""
    state: State = output.read_json(f"{folder}/{STATE}", State)
    return state


def check_world(output: Output, before: int, resources: WorkerResources) -> None:
    """ZeRO checkpoints are tied to the number of workers: only the weights can go over to another number."""
    now = max(resources.workers, 1)
    if before != now and resources.on_changed_world == "error":
        raise UserError(
            f"{output.uri}: training began with {before} worker(s), its resources now say {now}; go back to "
            f"workers: {before}, or set on_changed_world: weights beside it to go on from the weights with a fresh optimizer"
        )


def resume(output: Output, module: Any, build: Callable[[], Any], world: int) -> tuple[Any, State]:
    """The module's DeepSpeed engine, made by `build`, and the state to go on from, of the last checkpoint if any."""
    from safetensors.torch import load

    last = latest(output)
    if last is None:
        return build(), State(step=0, workers=world, resumed_from_weights=[], reports=[], best={})
    state = read_state(output, last)
    if state["workers"] == world:
        engine = build()
        with _on_disk(output) as folder:
            system, place = output.location[0], output.path(last)
            if folder is not None:
                pafs.copy_files(place, folder, system, pafs.LocalFileSystem())
            engine.load_checkpoint(folder or place, tag="zero", load_module_strict=False)
        return engine, state
    load_trained(module, load(output.read_bytes(f"{last}/{WEIGHTS}")))
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


def save_checkpoint(engine: Any, output: Output, best_metric: str | None, state: State) -> None:
    """Save in place of the last one. A barrier: every rank comes here at the same steps, with its share of the optimizer."""
    import torch

    last, place = latest(output), f"{CHECKPOINTS}/checkpoint_{state['step']:09}"
    system = output.location[0]
    system.create_dir(output.path(place), recursive=True)
    with _on_disk(output) as beside:
        folder = Path(beside or output.path(place))
        engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)
        _save_weights(engine, folder)
        if engine.global_rank == 0:
            state["best"] = _keep_best(folder, output, last, best_metric, state["reports"][-1])
        if beside is not None:
            pafs.copy_files(beside, output.path(place), pafs.LocalFileSystem(), system)
    torch.distributed.barrier()
    if engine.global_rank == 0:
        state["files"] = output.hashes([name for name in output.files() if name.startswith(f"{place}/")])
        output.write_json(f"{place}/{STATE}", state)
        _remove_others(output, place)


@contextmanager
def _on_disk(output: Output) -> Iterator[str | None]:
    """A temporary folder for the checkpoints of an output in an object store; of a local one they need none.

    DeepSpeed reads and writes files alone.
    """
    if isinstance(output.location[0], pafs.LocalFileSystem):
        yield None
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder


def _save_weights(engine: Any, folder: Path) -> None:
    """Rank 0 writes the trained weights, whole."""
    import deepspeed
    import torch
    from safetensors.torch import save_file

    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=engine.zero_optimization_partition_weights()):
        if torch.distributed.get_rank() == 0:
            save_file({name: p.detach().float().cpu().contiguous() for name, p in trained.items()}, folder / WEIGHTS)


def _keep_best(
    folder: Path, output: Output, last: str | None, metric: str | None, report: dict[str, float]
) -> dict[str, float]:
    """Carry the best weights so far from the last checkpoint into this one. Returns the best step's metrics."""
    if last is not None and metric is not None:
        best = read_state(output, last)["best"]
        if _or_worst(best[metric]) >= _or_worst(report[metric]):
            (folder / BEST).write_bytes(output.read_bytes(f"{last}/{BEST}"))
            return best
    shutil.copy(folder / WEIGHTS, folder / BEST)
    return report


def _or_worst(value: float) -> float:
    """NaN, of a training that diverged, is less than any value."""
    return -math.inf if math.isnan(value) else value
