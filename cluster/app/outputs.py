"""The outputs below a root: what refers to them, and removal of those that nothing refers to any more."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs as pafs

from cluster.app.checks import check_sources
from cluster.app.config import RunConfig
from cluster.app.graph import MADE, Graph
from cluster.artifacts import MANIFEST, Output, below, filesystem, outputs_of
from cluster.config import parse_yaml, validate
from cluster.driver import lease
from cluster.errors import UserError
from cluster.stage import Stage

CONFIG = "config.yaml"  # in a run's folder
MODELS = "models.json"  # in a run's folder: every model that a run of that name has made


@dataclass(frozen=True)
class OutputFolder(Output):
    """One output folder below a root; size in bytes."""

    size: int
    finished: bool

    @property
    def name(self) -> str:
        """`instance-digest`, as every command takes it."""
        return ":".join(self.location[1].split("/")[-2:])


def outputs(root: str) -> Iterator[OutputFolder]:
    """Every output folder below a root."""
    system, _ = filesystem(root)
    for output in (output for kind in MADE for output in outputs_of(root, kind)):
        files = system.get_file_info(pafs.FileSelector(output.location[1], recursive=True))
        yield OutputFolder(output.uri, sum(file.size or 0 for file in files), output.exists(MANIFEST))


def keep_models(run: Output, stages: list[Stage]) -> None:
    """Note a run's models: a later run of the same name does not make them anybody's."""
    known = _models(run)
    made = [f"{stage.instance}-{stage.digest}" for stage in stages if stage.model]
    run.write_json(MODELS, list(dict.fromkeys([*known, *made])))


def run_configs(root: str) -> Iterator[RunConfig]:
    """The configs of the whole runs that were done below a root. Raises UserError naming one that is damaged."""
    for run in _runs(root):
        if run.exists(CONFIG):
            yield kept_config(run)


def kept_config(run: Output, **changes: Any) -> RunConfig:
    """The config that a run keeps in its folder, with other values of some fields."""
    where = run.path(CONFIG)
    try:
        return validate(RunConfig, parse_yaml(run.read_bytes(CONFIG), where) | changes, where)
    except UserError as error:
        raise UserError(f"{error}\nmend it, do the run again, or remove {run.path('')} where nobody wants the run") from error


def _models(run: Output) -> list[str]:
    return run.read_json(MODELS, list[str]) if run.exists(MODELS) else []


def _runs(root: str) -> Iterator[Output]:
    system, base = filesystem(root)
    for folder in system.get_file_info(pafs.FileSelector(f"{base}/runs", allow_not_found=True)):
        yield Output(below(root, f"runs/{folder.base_name}"))


def users(graph: Graph) -> dict[str, list[str]]:
    """Who refers to an output, by its name: this config, the config of a run below the same root, its earlier models.

    Raises UserError when a source of such a run is missing: without it nobody can tell which outputs are the run's.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for run in _runs(graph.root):
        for name in _models(run):
            found[name].append(f"models of {run.uri.rpartition('/')[2]}")
    graphs = {"this config": graph, **{f"run {config.name}": Graph(config) for config in run_configs(graph.root)}}
    for user, other in graphs.items():
        check_sources(other.config, other.stages)
        for stage in (*other.stages, *other.beside):
            found[f"{stage.instance}-{stage.digest}"].append(user)
    return found


def remove(found: list[OutputFolder]) -> None:
    """Delete output folders. Raises UserError, and deletes nothing, when a driver is at work on one of them."""
    lease.check(*found)
    for output in found:
        system, path = output.location
        system.delete_dir(path)
