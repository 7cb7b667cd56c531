"""The outputs below a root: listing, and removal of those that nothing refers to any more."""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from pyarrow import fs as pafs

from cluster.app.checks import check_sources
from cluster.app.config import RunConfig
from cluster.app.graph import MADE, Graph
from cluster.artifacts import MANIFEST, Output, below, filesystem, outputs_of
from cluster.config import validate
from cluster.driver import lease


@dataclass(frozen=True)
class Found:
    """One output folder below a root; size in bytes."""

    uri: str
    size: int
    finished: bool


def outputs(root: str) -> Iterator[Found]:
    """Every output folder below a root."""
    system, _ = filesystem(root)
    for output in (output for kind in MADE for output in outputs_of(root, kind)):
        files = system.get_file_info(pafs.FileSelector(filesystem(output.uri)[1], recursive=True))
        yield Found(output.uri, sum(file.size or 0 for file in files), output.exists(MANIFEST))


def run_configs(root: str) -> Iterator[RunConfig]:
    """The configs of the whole runs that were done below a root."""
    system, base = filesystem(root)
    for folder in system.get_file_info(pafs.FileSelector(f"{base}/runs", allow_not_found=True)):
        run = Output(below(root, f"runs/{folder.base_name}"))
        if run.exists("config.yaml"):
            yield validate(RunConfig, yaml.safe_load(run.read_bytes("config.yaml")), run.path("config.yaml"))


def unused(graph: Graph) -> list[Found]:
    """Outputs that neither this config nor the config of a run below the same root refers to.

    Raises UserError when a source of such a run is missing: without it nobody can tell which outputs are the run's.
    """
    graphs = [graph, *map(Graph, run_configs(graph.root))]
    for found in graphs:
        check_sources(found.config, found.stages)
    used = {p.output(stage).uri for p in graphs for stage in p.known}
    return [found for found in outputs(graph.root) if found.uri not in used]


def remove(found: list[Found]) -> None:
    """Delete output folders. Raises UserError, and deletes nothing, when a driver is at work on one of them."""
    for output in found:
        lease.check(Output(output.uri))
    for output in found:
        system, path = filesystem(output.uri)
        system.delete_dir(path)
