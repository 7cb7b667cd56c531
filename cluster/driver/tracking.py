"""MLflow's runs: written by the driver alone, a view of the manifests that can be made again from them.

What it keeps of a table or a model, and the registry, is in `records.py`.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

import mlflow
from mlflow.entities import LifecycleStage, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from cluster.driver import records
from cluster.driver.interrupt import uninterrupted
from cluster.driver.mlflow_store import connect, reason, said, sqlite_file
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.provenance import git_commit
from cluster.redaction import hidden, without_user
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
            with uninterrupted():  # cut off in a write, a thread's connection may keep SQLite's file locked
                method(self, *args, **kwargs)
        except Exception as error:  # MLflow passes on what SQLAlchemy, HTTP clients and object stores raise
            if not self.silent_until:
                log.warning("MLflow fails; the work goes on without records: %s", reason(error))
            self.silent_until = time.monotonic() + RETRY_AFTER

    return cast(Method, attempt)


class Tracker:
    """One parent run for a driver's run, one child run for each stage it does.

    Raises UserError when the store cannot be used, before any work. What fails later is logged and left out; with
    `again` the last parent of this name is taken up, so that `complete` brings what is missing. Of the config no password
    of a URI is kept.
    """

    silent_until = 0.0

    def __init__(self, uri: str, experiment: str, name: str, config: Mapping[str, Any], again: bool = False) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        mlflow.set_tracking_uri(uri)  # the registry of a SQLite store looks up logged models there
        self.uri, self.name = uri, name
        self.at_work: set[str] = set()  # runs that this tracker has opened and not closed
        with said(uri):
            self.client = connect(uri)
            self.experiment = self._experiment(experiment)
            last = self.find(f"tags.`vdg.run` = '{name}'") if again else None
            self.parent = last or self._open_parent(hidden(config))

    def _experiment(self, name: str) -> str:
        """The id of the experiment, which is made where there is none."""
        try:
            if self.client.get_experiment_by_name(name) is None:
                path = sqlite_file(self.uri)  # whose artifacts go beside it, not where the command runs; a server has a place
                beside = (path.parent / "mlartifacts").as_uri() if path is not None else None
                return self.client.create_experiment(name, beside, KIND)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another driver has made it meanwhile
                raise
        found = self.client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage == LifecycleStage.DELETED:
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id if found else 'ID'}"
            raise UserError(
                f"tracking.experiment: '{name}' is deleted in MLflow at {without_user(self.uri)}; give another name, or "
                f"bring it back: `{restore}`, with the URI as MLFLOW_TRACKING_URI"
            )
        return found.experiment_id

    def _open_parent(self, config: Mapping[str, Any]) -> str:
        parent = self.open(self.name, {"vdg.run": self.name, "git.commit": git_commit()})
        try:
            self.client.log_dict(parent, dict(config), "config.json")
            records.log_params(self.client, parent, config)
        except BaseException:
            self.close(parent, "FAILED")
            raise
        return parent

    def find(self, condition: str) -> str | None:
        """Id of the latest run of the experiment for which a condition holds."""
        runs = self.client.search_runs([self.experiment], condition, ViewType.ACTIVE_ONLY, 1, ["attributes.start_time DESC"])
        return runs[0].info.run_id if runs else None

    def open(self, name: str, tags: dict[str, str]) -> str:
        """Create a run. Returns its id."""
        run_id = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self.at_work.add(run_id)
        return run_id

    def close(self, run_id: str, status: str) -> None:
        """End a run."""
        self.client.set_terminated(run_id, status)
        self.at_work.discard(run_id)

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

        Raises what the store raises.
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
        records.register(self.client, self.experiment, stage, root, self.name, "recommended")

    @_tolerant
    def keep(self, name: str, text: str) -> None:
        """A file of the whole run, such as its report."""
        self.client.log_text(self.parent, text, name)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Close the parent run, with runs of stages that were cut off; a store that failed a moment ago is tried again."""
        self.silent_until = 0.0
        self._finish(status, metrics)

    @_tolerant
    def _finish(self, status: str, metrics: Mapping[str, float]) -> None:
        for run_id in self.at_work - {self.parent}:
            self.close(run_id, "KILLED")
        self.client.log_batch(self.parent, metrics=records.metrics(metrics, 0))
        self.close(self.parent, status)


class StageRun(Monitor):
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
                "output": without_user(stage.output(self.root).uri),
                **{f"parent.{role}": f"{parent.instance}-{parent.digest}" for role, parent in stage.parents.items()},
            }
            self.run_id = tracker.open(stage.instance, tags)
        records.log_inputs(self.client, tracker.experiment, self.run_id, stage, self.root)
        self._has_inputs = True

    @_tolerant
    def start(self, total: int, unit: str, done: int = 0) -> None:
        """How much there was to do."""
        self.client.log_batch(self.run_id, tags=[RunTag("total", f"{total} {unit}s"), RunTag("resumed_from", str(done))])

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

        Raises what the store raises.
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
            records.register(client, tracker.experiment, stage, self.root, stage.name, f"run-{tracker.name}")
        client.set_tag(self.run_id, COMPLETE, "yes")
        tracker.close(self.run_id, "FINISHED")

    @_tolerant
    def fail(self, status: str) -> None:
        """Close the run as FAILED or KILLED; what was done stays for the next one."""
        self._stop_watching()
        self.tracker.close(self.run_id, status)

    def _stop_watching(self) -> None:
        if self.system is not None:
            self.system.finish()
