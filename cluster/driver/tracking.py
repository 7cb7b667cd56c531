"""MLflow records of runs: written by the driver alone, a view of the manifests that can be made again from them."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import mlflow
from mlflow.entities import RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from cluster.driver import records
from cluster.errors import UserError
from cluster.provenance import git_commit
from cluster.stage import Stage
from cluster.training.loop import METRICS, reports_of

log = logging.getLogger(__name__)
RETRY_AFTER = 60.0  # seconds without an attempt after a failure: waiting for a dead server would hold up the work
Method = TypeVar("Method", bound=Callable[..., None])
KIND = {"mlflow.experimentKind": "custom_model_development"}  # its page opens on runs and models, not on traces
COMPLETE = "complete"  # tag of a run that has all of its stage's record


def _tolerant(method: Method) -> Method:
    """Once a run has begun MLflow never stops it: a record that fails is left out, and the first one is logged."""

    @wraps(method)
    def attempt(self: "Tracker | StageRun", *args: Any, **kwargs: Any) -> None:
        """`method`, unless the store has failed a moment ago."""
        if time.monotonic() < self.silent_until:
            return
        try:
            method(self, *args, **kwargs)
        except MlflowException as error:
            if not self.silent_until:
                log.warning("MLflow cannot be reached; the work goes on without records: %s", error)
            self.silent_until = time.monotonic() + RETRY_AFTER

    return cast(Method, attempt)


class Tracker:
    """One parent run for a driver's run, one child run for each stage it does.

    Raises UserError when the store cannot be reached, before any work. What fails later is logged and left out; with
    `again` the last parent of this name is taken up, so that `complete` brings what is missing.
    """

    silent_until = 0.0

    def __init__(self, uri: str, experiment: str, name: str, config: Mapping[str, Any], again: bool = False) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it creates
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        mlflow.set_tracking_uri(uri)  # the registry of a SQLite store looks up logged models there
        place = _artifacts_beside(uri)
        self.uri, self.name = uri, name
        try:
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(experiment)
            self.experiment = found.experiment_id if found else self.client.create_experiment(experiment, place, KIND)
            self.parent = (self._last_parent() if again else None) or self._open_parent(config)
        except MlflowException as error:
            raise UserError(
                f"tracking.uri: MLflow at {uri} cannot be reached ({error}); start it or give another URI"
            ) from error

    def _open_parent(self, config: Mapping[str, Any]) -> str:
        parent = self.open(self.name, {"vdg.run": self.name, "git.commit": git_commit()})
        self.client.log_dict(parent, dict(config), "config.json")
        records.log_params(self.client, parent, config)
        return parent

    def _last_parent(self) -> str | None:
        return self.find(f"tags.`vdg.run` = '{self.name}'")

    def find(self, condition: str) -> str | None:
        """Id of the latest run of the experiment for which a condition holds."""
        runs = self.client.search_runs([self.experiment], condition, ViewType.ACTIVE_ONLY, 1, ["attributes.start_time DESC"])
        return runs[0].info.run_id if runs else None

    def open(self, name: str, tags: dict[str, str]) -> str:
        """Create a run. Returns its id."""
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    @_tolerant
    def skipped(self, stage: Stage) -> None:
        """A stage that an earlier run finished: the parent names its digest."""
        self.client.set_tag(self.parent, f"skipped.{stage.instance}", stage.digest)

    def begin(self, stage: Stage, root: str) -> "StageRun":
        """Open a stage's child run."""
        run = StageRun(self, stage, root)
        run.open()
        return run

    def complete(self, stage: Stage, root: str) -> bool:
        """Bring what MLflow lacks of a finished stage. Returns whether it lacked anything.

        Raises MlflowException where the store cannot be reached.
        """
        of_stage = f"tags.digest = '{stage.digest}' and tags.stage = '{stage.kind}'"
        if self.find(f"{of_stage} and tags.{COMPLETE} = 'yes'"):
            return False
        run = StageRun(self, stage, root)
        run.run_id = self.find(of_stage) or ""
        manifest = stage.output(root).manifest()
        assert manifest is not None, "only finished stages are completed"
        run.complete(manifest)
        return True

    @_tolerant
    def scored(self, stage: Stage, root: str, values: Mapping[str, float]) -> None:
        """What an evaluation found of a model."""
        run = self.find(f"tags.digest = '{stage.digest}' and tags.stage = '{stage.kind}'")
        if run is not None:
            records.log_scores(self.client, self.experiment, run, stage, root, values)

    @_tolerant
    def recommend(self, stage: Stage, root: str) -> None:
        """The model of the whole run that is to be used."""
        records.recommend(self.client, self.experiment, stage, root, self.name)

    @_tolerant
    def keep(self, name: str, text: str) -> None:
        """A file of the whole run, such as its report."""
        self.client.log_text(self.parent, text, name)

    @_tolerant
    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Close the parent run."""
        self.client.log_batch(self.parent, metrics=records.metrics(metrics, 0))
        self.client.set_terminated(self.parent, status)


def _artifacts_beside(uri: str) -> str | None:
    """Where a SQLite store's artifacts go: beside it, not in whatever folder the command runs. A server has its own place."""
    if not uri.startswith("sqlite:///"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).parent
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "mlartifacts").as_uri()


class StageRun:
    """The child run of one stage; a monitor that records training metrics.

    What is written while the stage runs is for those who watch: `complete` writes all that is missing at the end.
    """

    silent_until = 0.0

    def __init__(self, tracker: Tracker, stage: Stage, root: str) -> None:
        self.tracker, self.stage, self.root = tracker, stage, root
        self.client, self.run_id = tracker.client, ""
        self._has_inputs = False
        self.system: SystemMetricsMonitor | None = None

    @_tolerant
    def open(self) -> None:
        """Record what the stage is made from, and from now on the load of the driver's machine."""
        self._record_inputs()
        self.system = SystemMetricsMonitor(self.run_id, tracking_uri=self.tracker.uri)
        self.system.start()

    def _record_inputs(self) -> None:
        """Once: its settings and its parents' as params, the tables and models among its ancestors, everything by digest."""
        stage, tracker = self.stage, self.tracker
        if self._has_inputs:
            return
        if not self.run_id:
            tags = {
                "mlflow.parentRunId": tracker.parent,
                "stage": stage.kind,
                "digest": stage.digest,
                "output": stage.output(self.root).uri,
                **{f"parent.{role}": f"{parent.instance}-{parent.digest}" for role, parent in stage.parents.items()},
            }
            self.run_id = tracker.open(stage.instance, tags)
        records.log_inputs(self.client, tracker.experiment, self.run_id, stage, self.root)
        self._has_inputs = True

    @_tolerant
    def start(self, total: int, unit: str, done: int = 0) -> None:
        """How much there was to do."""
        self.client.log_batch(self.run_id, tags=[RunTag("total", f"{total} {unit}s"), RunTag("resumed_from", str(done))])

    def advance(self, count: int) -> None:
        """Progress is not recorded."""

    @_tolerant
    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Live training metrics."""
        self.client.log_batch(self.run_id, metrics=records.metrics(values, step))

    @_tolerant
    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Complete the record and close the run."""
        self._stop_watching()
        self.complete(manifest)

    def complete(self, manifest: Mapping[str, Any]) -> None:
        """Write what the run lacks of inputs, code, counts, training metrics and output, then close it.

        Raises MlflowException where the store cannot be reached.
        """
        client, tracker, stage = self.client, self.tracker, self.stage
        self._record_inputs()
        code = [RunTag(f"code.{name}", value) for name, value in manifest.get("code", {}).items()]
        client.log_batch(self.run_id, tags=code)
        counts = {"rows": manifest["rows"], "rejects": sum(manifest["rejects"].values())}
        counts |= {name: manifest[name] for name in ("seconds", "startup_seconds") if name in manifest}
        output = stage.output(self.root)
        reports = reports_of(output) if output.exists(METRICS) else []
        records.log_missing_metrics(client, self.run_id, [{"step": 0, **counts}, *reports])
        records.log_output(client, tracker.experiment, self.run_id, stage, self.root)
        if stage.model:
            records.register(client, tracker.experiment, stage, self.root, tracker.name)
        client.set_tag(self.run_id, COMPLETE, "yes")
        client.set_terminated(self.run_id, "FINISHED")

    @_tolerant
    def fail(self) -> None:
        """Close the run as failed; what was done stays for the next one."""
        self._stop_watching()
        self.client.set_terminated(self.run_id, "FAILED")

    def _stop_watching(self) -> None:
        if self.system is not None:
            self.system.finish()
