"""Doing the stages of a run in one driver, side by side where there is room: what is done is skipped, MLflow keeps record."""

import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from rich.text import Text

from cir.evaluate import METRICS
from cir.train import ModelName
from cluster.app.checks import check
from cluster.app.config import RunConfig
from cluster.app.graph import Graph
from cluster.app.outputs import CONFIG, keep_models
from cluster.app.recommend import recommend
from cluster.artifacts import Output, below, filesystem
from cluster.config import WorkerResources, in_folder
from cluster.driver import lease, session
from cluster.driver.demand import nodes, require, resources_of
from cluster.driver.mlflow_store import sqlite_uri
from cluster.driver.progress import RunProgress, StageProgress, console
from cluster.driver.schedule import Room, Schedule, Work
from cluster.errors import UserError
from cluster.manifest import Manifest
from cluster.monitor import Several
from cluster.redaction import hidden, without_user
from cluster.stage import Stage, run_together
from cluster.training.groups import Groups
from cluster.verify import verify

HIDDEN = (
    "kept without the passwords of its URIs; a run from it takes them from the environment, such as MLFLOW_TRACKING_USERNAME "
    "and MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


def run(graph: Graph, stages: list[Stage], keep_config: bool = False) -> None:
    """Do the stages that have no manifest yet, each as one Ray Data execution or one training run.

    `keep_config` marks a whole run: its config stays in its folder, and `vdg clean` spares the outputs it refers to.
    Raises UserError before any work when an input is missing, the root cannot be written, a finished output is not as it was
    made, another driver is at work on one of the outputs, or MLflow cannot be reached; later when the user stops it. What is
    finished stays.
    """
    config, log = graph.config, log_file(graph.config)
    todo = [stage for stage in stages if graph.output(stage).manifest() is None]
    if todo:
        session.prepare(config.resources.ray)
    check(config, todo)
    _check_writable(config.root)
    verify(graph.output(stage) for stage in stages if stage not in todo)
    lease.check(*map(graph.output, todo))
    from cluster.driver.tracking import Tracker

    tracker = Tracker(tracking_uri(config), config.tracking.experiment, config.name, config.model_dump(mode="json"))
    status = "FAILED"
    try:
        if keep_config:
            _keep_config(config)
            keep_models(run_folder(config), stages)
        console.print(f"MLflow: experiment '{config.tracking.experiment}' at {tracker.uri}")
        console.print(f"{config.name}: {len(todo)} of {len(stages)} stages to do; library logs go to {log}")
        for stage in stages:
            if stage not in todo:
                tracker.skipped(stage)
        if todo:
            session.start(config.resources.ray, log)
            for line in require(todo, nodes(config.resources.ray) or []):
                console.print(f"  waiting for an autoscaler: {line}")
            with RunProgress() as progress, Groups(config.resources.ray.where != "local") as groups:
                _Driver(config, tracker, progress, groups).do(todo)
        if keep_config and graph.output(graph.results).manifest() is not None:
            write_results(graph)
            record_results(graph, tracker)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and the SIGTERM of a cluster
        status = "KILLED"
        raise UserError("stopped; the same command goes on from what is finished") from None
    finally:
        tracker.finish(status, headline(graph) if status == "FINISHED" else {})


def _keep_config(config: RunConfig) -> None:
    """In the run's folder, as it is read from any folder; without the passwords of its URIs."""
    whole = in_folder(RunConfig, config.model_dump(mode="json"), Path.cwd())
    kept = hidden(whole)
    note = "" if kept == whole else f"# {HIDDEN}\n"
    run_folder(config).write_bytes(CONFIG, (note + yaml.safe_dump(kept, sort_keys=False)).encode())
    if note:
        console.print(f"{run_folder(config).path(CONFIG)}: {HIDDEN}")


def _check_writable(root: str) -> None:
    probe = Output(below(root, f"runs/.{uuid.uuid4().hex}"))
    try:
        probe.write_bytes("probe", b"")
        probe.location[0].delete_dir(probe.location[1])
    except OSError as error:
        where, why = filesystem(root)[1], without_user(str(error))
        raise UserError(f"root: {where} cannot be written ({why}); see to its disk and its rights, or give another") from error


class _Driver:
    """What the stages of a run share while they work side by side."""

    def __init__(self, config: RunConfig, tracker: Any, progress: RunProgress, groups: Groups) -> None:
        self.config, self.tracker, self.progress, self.groups = config, tracker, progress, groups
        self.recording = Lock()  # two that enter a model under one name would both create it

    def do(self, stages: list[Stage]) -> None:
        """Those for which workers wait go first."""
        import ray

        room = Room(ray.cluster_resources(), self.config.resources.stages)
        Schedule(stages, room, self._do).run(
            first=lambda stage: self.groups.waiting(resources_of(stage)), wait=self._wait, started=partial(self._let_go, room)
        )

    def _wait(self, stage: Stage, running: list[Stage]) -> bool:
        """A training waits for workers at another that is soon done: others would take longer to start."""
        resources = resources_of(stage)
        shape = self.groups.shape(resources)
        alike = sum(self.groups.shape(resources_of(each)) == shape for each in running)
        return isinstance(resources, WorkerResources) and alike > 0 and not self.groups.worth(resources, alike)

    def _let_go(self, room: Room, running: list[Stage], waiting: list[Stage]) -> None:
        """Workers that wait for a stage to come stay where there is room for what they reserve beside the stages at work."""
        kept, free = list(running), list[Stage]()
        for stage in waiting:
            resources = resources_of(stage)
            if isinstance(resources, WorkerResources) and self.groups.waiting(resources):
                if not self.groups.reserve(resources):
                    free.append(stage)
                elif room.takes(stage, kept):
                    kept.append(stage)
        self.groups.keep([resources_of(stage) for stage in (*kept, *free)])

    def _do(self, work: Work) -> None:
        root = self.config.root
        with self.recording:
            records = {stage: self.tracker.begin(stage, root) for stage in work}
        try:
            with ExitStack() as held:
                bars = {stage: held.enter_context(StageProgress(stage.instance, self.progress.bars)) for stage in work}
                for stage in work:
                    held.enter_context(lease.hold(stage.output(root)))
                found = run_together({stage: Several(bars[stage], records[stage]) for stage in work}, root, self.groups)
        except BaseException as error:
            with self.recording:
                for record in records.values():
                    record.fail("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise
        failure = None
        for stage, manifest in found.items():
            with self.recording:
                if isinstance(manifest, UserError):
                    records[stage].fail("FAILED")
                    failure = failure or manifest
                else:
                    records[stage].finish(manifest)
                    _say(stage, manifest)
        if failure is not None:
            raise failure


def _say(stage: Stage, manifest: Manifest) -> None:
    """The line of a stage that is done."""
    rejected = sum(manifest["rejects"].values())
    counts = f"{manifest['rows']:,} rows" if manifest["rows"] else stage.model or ""
    rejects = f", {rejected} rejected {manifest['rejects']}" if rejected else ""
    startup = f", {manifest['startup_seconds']:.0f} s of them start-up" if manifest["startup_seconds"] >= 1 else ""
    console.print(f"  {stage.instance}-{stage.digest}: {counts}{rejects} in {manifest['seconds']:.0f} s{startup}")
    for warning in manifest.get("warnings", ()):
        console.print(Text(f"  {stage.instance}: {warning}", style="yellow"))


def write_results(graph: Graph) -> Output:
    """The metrics and the report of a run whose stages are finished, in its folder."""
    from cluster.app.report import write_report

    verify(map(graph.output, graph.stages))
    folder = run_folder(graph.config)
    folder.write_json(METRICS, metrics_of(graph))
    if graph.config.evaluate.scores_models:
        write_report(graph, folder)
    return folder


def record_results(graph: Graph, tracker: Any) -> None:
    """Tell MLflow: the files that were written, and of each model what was found."""
    folder = run_folder(graph.config)
    for name in (METRICS, "report.html"):
        if folder.exists(name):
            tracker.keep(name, folder.read_bytes(name).decode())
    table, places = metrics_of(graph), Counter[str]()
    for name in sorted(graph.models, key=ModelName.parse) if graph.config.evaluate.scores_models else ():
        variant = ModelName.parse(name).variant
        values = {metric: value["seeds"][places[variant]] for metric, value in table[variant].items() if "(" not in metric}
        places[variant] += 1
        tracker.scored(graph.models[name], graph.root, values)
    if recommended := recommend(graph):
        tracker.recommend(graph.models[recommended.model], graph.root)


def run_folder(config: RunConfig) -> Output:
    """Where a run's config, report and metrics live."""
    return Output(below(config.root, f"runs/{config.name}"))


def log_file(config: RunConfig) -> Path:
    """The local file that takes the libraries' log lines."""
    local = "://" not in config.root
    return Path(filesystem(config.root)[1] if local else ".") / "runs" / config.name / "log.txt"


def tracking_uri(config: RunConfig) -> str:
    """The configured MLflow store, or a SQLite file in the root. Raises UserError when the root is no folder for it."""
    if config.tracking.uri is not None:
        return config.tracking.uri
    if "://" in config.root:
        raise UserError(f"tracking.uri: give an MLflow server's URI; SQLite cannot live in {without_user(config.root)}")
    return sqlite_uri(Path(filesystem(config.root)[1]) / "mlflow.db")


def metrics_of(graph: Graph) -> dict[str, Any]:
    """variant -> metric -> {"mean", "seeds"}, of a finished evaluation."""
    return graph.output(graph.results).read_json(METRICS)


def headline(graph: Graph) -> Mapping[str, float]:
    """variant/metric -> mean, as MLflow takes it; empty without a finished evaluation."""
    if graph.output(graph.results).manifest() is None:
        return {}
    table = metrics_of(graph)  # MLflow takes no parentheses: further protocols are in metrics.json alone
    means = {f"{variant}/{name}": value["mean"] for variant, row in table.items() for name, value in row.items()}
    return {name: mean for name, mean in means.items() if "(" not in name}
