"""The outputs below a root: what refers to them, and removal of those that nothing refers to any more."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from pyarrow import fs as pafs

from cluster.app.checks import check_sources
from cluster.app.config import RunConfig
from cluster.app.graph import KINDS, Graph
from cluster.artifacts import MANIFEST, Output, below, filesystem, outputs_of
from cluster.config import validate
from cluster.driver import lease
from cluster.stage import Stage

MODELS = "models.json"  # in a run's folder: every model that a run of that name has made


@dataclass(frozen=True)
class Found:
    """One output folder below a root; size in bytes."""

    uri: str
    size: int
    finished: bool

    @property
    def name(self) -> str:
        """`instance-digest`, as every command takes it."""
        return ":".join(filesystem(self.uri)[1].split("/")[-2:])


def outputs(root: str) -> Iterator[Found]:
    """Every output folder below a root."""
    system, _ = filesystem(root)
    for output in (output for kind in KINDS for output in outputs_of(root, kind)):
        files = system.get_file_info(pafs.FileSelector(filesystem(output.uri)[1], recursive=True))
        yield Found(output.uri, sum(file.size or 0 for file in files), output.exists(MANIFEST))


def keep_models(run: Output, stages: list[Stage]) -> None:
    """Note a run's models: a later run of the same name does not make them anybody's."""
    known = run.read_json(MODELS) if run.exists(MODELS) else []
    made = [f"{stage.instance}-{stage.digest}" for stage in stages if stage.model]
    run.write_json(MODELS, list(dict.fromkeys([*known, *made])))


def users(graph: Graph) -> dict[str, list[str]]:
    """Who refers to an output, by its name: this config, the config of a run below the same root, its earlier models.

    Raises UserError when a source of such a run is missing: without it nobody can tell which outputs are the run's.
    """
    found: dict[str, list[str]] = defaultdict(list)
    system, base = filesystem(graph.root)
    graphs = {"this config": graph}
    for folder in system.get_file_info(pafs.FileSelector(f"{base}/runs", allow_not_found=True)):
        run = Output(below(graph.root, f"runs/{folder.base_name}"))
        if run.exists("config.yaml"):
            content = yaml.safe_load(run.read_bytes("config.yaml"))
            graphs[f"run {folder.base_name}"] = Graph(validate(RunConfig, content, run.path("config.yaml")))
        for name in run.read_json(MODELS) if run.exists(MODELS) else ():
            found[name].append(f"models of {folder.base_name}")
    for user, other in graphs.items():
        check_sources(other.config, other.stages)
        for stage in other.stages:
            found[f"{stage.instance}-{stage.digest}"].append(user)
    return found


def remove(found: list[Found]) -> None:
    """Delete output folders. Raises UserError, and deletes nothing, when a driver is at work on one of them."""
    for output in found:
        lease.check(Output(output.uri))
    for output in found:
        system, path = filesystem(output.uri)
        system.delete_dir(path)
