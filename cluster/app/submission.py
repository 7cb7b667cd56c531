"""A run, or some of its stages, as a Ray job."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.app import config as configs
from cluster.app.config import RunConfig
from cluster.app.graph import KINDS, Graph
from cluster.app.runner import tracking_uri
from cluster.artifacts import Output
from cluster.config import override
from cluster.driver.jobs import CONFIG, Job, check_paths, check_secrets
from cluster.driver.session import RayConfig
from cluster.errors import UserError
from cluster.manifest import digest_of
from cluster.provenance import git_commit
from cluster.stage import Stage


def prepare(
    config: str, assignments: list[str], only: str | None, until: str | None, local: bool, environment: Mapping[str, str]
) -> tuple[Job, dict[str, str]]:
    """The job, and the paths that it reads on the cluster, by config field.

    `local` says that the cluster's nodes see the disks of this machine.
    Raises UserError naming each field whose path or secret must not travel.
    """
    graph = Graph(_placed(configs.load(config, assignments), local))
    command, stages = _command(graph, only, until)
    written = override(configs.read_config(config), assignments)
    paths = {"root": graph.config.root} | {field: source.path for stage in stages for field, source in stage.sources.items()}
    if (tracking := graph.config.tracking.uri or "").startswith("sqlite:///"):
        paths["tracking.uri"] = tracking.removeprefix("sqlite:///")
    # of folders of weights as they are written: a loaded config has them absolute, in this machine's terms
    paths |= {field: text for field, text in _texts(written) if field.endswith(".folder")}
    check_paths(paths, local)
    tracking_uri(graph.config)  # refuses here what the job would refuse there
    sent = graph.config.model_dump(mode="json")
    check_secrets(environment, dict(_texts(sent)))
    digest = digest_of([command, [(stage.instance, stage.digest) for stage in stages]])
    # a file that decides a digest, and that only the cluster sees, gives another one there
    folders = [weights.folder for stage in stages for weights in stage.weights.values() if weights.folder is not None]
    elsewhere = any(stage.missing() for stage in stages) or not all(Path(folder).exists() for folder in folders)
    job = Job(
        base=f"{graph.config.name}-{digest}",
        entrypoint=f"python -m cluster.app {shlex.join(command)}",
        config=yaml.safe_dump(sent, sort_keys=False),
        environment=environment,
        outputs=() if elsewhere else tuple(graph.output(stage).uri for stage in stages),
        metadata={"run": graph.config.name, "digest": digest, "root": graph.config.root, "git_commit": git_commit()},
    )
    return job, paths


def _placed(config: RunConfig, local: bool) -> RunConfig:
    """The config as the job reads it: on the cluster that runs the job, and with a root beside this command if `local`."""
    resources = config.resources.model_copy(update={"ray": RayConfig()})
    root = Output(config.root).uri if local else config.root
    return config.model_copy(update={"resources": resources, "root": root})


def _command(graph: Graph, only: str | None, until: str | None) -> tuple[list[str], list[Stage]]:
    """Arguments of `vdg` on the cluster, and the stages that they do."""
    if only is None:
        return ["run", CONFIG, *(["--until", until] if until else [])], graph.select(None, None, until)
    if until is not None:
        raise UserError("--until: give it or --only, not both")
    kind = only.partition(":")[0]
    if kind not in KINDS:
        raise UserError(f"--only {only}: begin with a stage, such as 'train:semi.*'; stages are {', '.join(KINDS)}")
    pattern = [] if kind == "evaluate" else ["--only", only]
    return [kind, CONFIG, *pattern], graph.select(kind, only, None)


def _texts(node: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """(field, text) of every text in a config."""
    if isinstance(node, str):
        yield field, node
    elif isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{field}.{name}" if field else str(name))
