"""MLflow records of runs: written by the driver alone, a view of the manifests that can be made again from them."""

import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from cluster.artifacts import Stage
from cluster.errors import UserError

log = logging.getLogger(__name__)
RETRY_AFTER = 60.0  # seconds without an attempt after a failure: waiting for a dead server would hold up the work
Method = TypeVar("Method", bound=Callable[..., None])
TABLES = {"ingest": "dataset", "embed": "embeddings", "mine": "pairs", "generate": "pseudo_triplets"}


def _tolerant(method: Method) -> Method:
    """Once a run has begun MLflow never stops it: a record that fails is left out, and the first one is logged."""

    @wraps(method)
    def attempt(self: "Tracker | StageRun", *args: Any, **kwargs: Any) -> None:
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

    Raises UserError when the store cannot be reached, before any work. What fails later is logged and left out.
    """

    silent_until = 0.0

    def __init__(self, uri: str, experiment: str, name: str, config: Mapping[str, Any]) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it creates
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        place = _artifacts_beside(uri)
        try:
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(experiment)
            self.experiment = found.experiment_id if found else self.client.create_experiment(experiment, place)
        except MlflowException as error:
            raise UserError(
                f"tracking.uri: MLflow at {uri} cannot be reached ({error}); start it or give another URI"
            ) from error
        self.parent = self.open(name, {"git.commit": git_commit()})
        self.client.log_dict(self.parent, dict(config), "config.json")

    def open(self, name: str, tags: dict[str, str]) -> str:
        """Create a run. Returns its id."""
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    @_tolerant
    def skipped(self, stage: Stage) -> None:
        """A stage that an earlier run finished: the parent names its digest."""
        self.client.set_tag(self.parent, f"skipped.{stage.instance}", stage.digest)

    def begin(self, stage: Stage, root: str) -> "StageRun":
        """Open a stage's child run."""
        run = StageRun(self.client)
        run.open(self, stage, root)
        return run

    @_tolerant
    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Close the parent run."""
        self.client.log_batch(self.parent, metrics=_metrics(metrics, 0))
        self.client.set_terminated(self.parent, status)


def _artifacts_beside(uri: str) -> str | None:
    """Where a SQLite store's artifacts go: beside it, not in whatever folder the command runs. A server has its own place."""
    if not uri.startswith("sqlite:///"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).parent
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / "mlartifacts").as_uri()


class StageRun:
    """The child run of one stage; a monitor that records training metrics."""

    silent_until = 0.0

    def __init__(self, client: MlflowClient) -> None:
        self.client, self.run_id = client, ""

    @_tolerant
    def open(self, tracker: Tracker, stage: Stage, root: str) -> None:
        """Record what the stage is made from.

        Its settings and its parents' as params, the tables among its ancestors as datasets, everything by digest.
        """
        parents = stage.parents.items()
        tags = {
            "mlflow.parentRunId": tracker.parent,
            "stage": stage.kind,
            "digest": stage.digest,
            "output": stage.output(root).uri,
            **{f"parent.{role}": f"{parent.instance}-{parent.digest}" for role, parent in parents},
        }
        self.run_id = tracker.open(stage.instance, tags)
        settings = _flat({**stage.settings, "version": stage.version})
        for role, parent in parents:
            settings += _flat(parent.settings, f"parent.{role}.")
        params = [Param(name, str(value)[:500]) for name, value in settings]
        for first in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[first : first + 100])
        tables = {ancestor.instance: (ancestor, role) for role, ancestor in _ancestors(stage) if ancestor.kind in TABLES}
        self.client.log_inputs(self.run_id, datasets=[_dataset(table, role, root) for table, role in tables.values()])

    @_tolerant
    def start(self, total: int, unit: str, done: int = 0) -> None:
        """How much there was to do."""
        self.client.log_batch(self.run_id, tags=[RunTag("total", f"{total} {unit}s"), RunTag("resumed_from", str(done))])

    def advance(self, count: int) -> None:
        """Progress is not recorded."""

    @_tolerant
    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Live training metrics."""
        self.client.log_batch(self.run_id, metrics=_metrics(values, step))

    @_tolerant
    def finish(self, stage: Stage, root: str, manifest: Mapping[str, Any]) -> None:
        """Record the counts of the manifest and the output as a dataset, then close the run."""
        counts = {"rows": manifest["rows"], "rejects": sum(manifest["rejects"].values()), "seconds": manifest["seconds"]}
        self.client.log_batch(self.run_id, metrics=_metrics(counts, 0))
        if stage.kind in TABLES:
            self.client.log_inputs(self.run_id, datasets=[_dataset(stage, "output", root)])
        self.client.set_terminated(self.run_id, "FINISHED")

    @_tolerant
    def fail(self) -> None:
        """Close the run as failed; what was done stays for the next one."""
        self.client.set_terminated(self.run_id, "FAILED")


def _ancestors(stage: Stage, prefix: str = "") -> Iterator[tuple[str, Stage]]:
    """(role, stage) of everything a stage is made from, the nearest last; the role of a parent's parent has a dot."""
    for role, parent in stage.parents.items():
        yield from _ancestors(parent, f"{prefix}{role}.")
        yield f"{prefix}{role}", parent


def _dataset(stage: Stage, role: str, root: str) -> DatasetInput:
    source = json.dumps({"uri": stage.output(root).uri})
    name = f"{TABLES[stage.kind]}/{stage.instance.partition(':')[2]}"
    dataset = Dataset(name=name, digest=stage.digest, source_type="local", source=source)
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", role)])


def _metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(name.replace("@", "_at_"), float(value), now, step) for name, value in values.items()]


def _flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in node.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(f"{prefix}{name}", value)]
    return rows


def git_commit() -> str:
    """The commit of the code that runs, or 'unknown' outside a git checkout."""
    folder = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
