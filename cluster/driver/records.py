"""What MLflow keeps of an output: a table as a dataset, a model as a logged and registered model, each by its digest.

Their content stays where it is; MLflow has the URI. Everything here may be done again and changes nothing then.
"""

import json
import platform
import posixpath
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, LoggedModelOutput, Metric, Param
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from cluster.redaction import without_user
from cluster.stage import Stage

PLACE = "place.json"  # of a registered model: the URI of its output, and its digest


def log_inputs(client: MlflowClient, experiment: str, run_id: str, stage: Stage, root: str) -> None:
    """Settings of a stage and its parents as params; the tables and models among its ancestors as inputs."""
    parents = {f"parent.{role}": parent.settings for role, parent in stage.parents.items()}
    log_params(client, run_id, {**stage.settings, "version": stage.version, **parents})
    found = {ancestor.instance: (ancestor, role) for role, ancestor in _ancestors(stage)}
    tables = [_dataset(table, role, root) for table, role in found.values() if table.table]
    models = [_logged_model(client, experiment, model, root) for model, _ in found.values() if model.model]
    client.log_inputs(run_id, datasets=tables, models=[LoggedModelInput(model) for model in models])


def log_params(client: MlflowClient, run_id: str, settings: Mapping[str, Any]) -> None:
    """Settings as params, those of a section by its name and theirs."""
    params = [Param(_name(name), str(value)[:500]) for name, value in _flat(settings)]
    for first in range(0, len(params), 100):
        client.log_batch(run_id, params=params[first : first + 100])


def log_scores(
    client: MlflowClient, experiment: str, run_id: str, stage: Stage, root: str, values: Mapping[str, float]
) -> None:
    """What an evaluation found of a model: metrics of its logged model, and tags of its registered version."""
    model = _logged_model(client, experiment, stage, root)
    known = {metric.key: metric.value for metric in client.get_logged_model(model).metrics or ()}
    for name, value in values.items():
        if known.get(_metric_name(name)) != value:
            client.log_metric(run_id, _metric_name(name), value, model_id=model)
    for version in _versions(client, _registered_name(client, experiment, stage.name), stage):
        for name, value in values.items():
            client.set_model_version_tag(version.name, version.version, _metric_name(name), f"{value:.1f}")


def log_output(client: MlflowClient, experiment: str, run_id: str, stage: Stage, root: str) -> None:
    """A finished table as a dataset of its run, a finished model as its logged model."""
    if stage.table:
        client.log_inputs(run_id, datasets=[_dataset(stage, "output", root)])
    if stage.model:
        model = _logged_model(client, experiment, stage, root, run_id)
        outputs = client.get_run(run_id).outputs
        if outputs is None or model not in {output.model_id for output in outputs.model_outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model, 0)])


def register(client: MlflowClient, experiment: str, stage: Stage, root: str, as_: str, alias: str) -> None:
    """A model as a version of the registered model `<experiment>.<as_>`, made where none has its digest; the alias moves to it.

    MLflow keeps aliases such as `latest` and `v2` for itself. The version's source is the logged model: a server refuses
    folders of its own machine. The URI is in a tag.
    """
    name = _registered_name(client, experiment, as_)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [version.version for version in _versions(client, name, stage)]
    if not known:
        model = _logged_model(client, experiment, stage, root)
        tags = _identity(stage, root)
        known = [client.create_model_version(name, f"models:/{model}", tags=tags, model_id=model).version]
    client.set_registered_model_alias(name, re.sub(r"[^\w-]", "-", alias), known[0])


def _registered_name(client: MlflowClient, experiment: str, name: str) -> str:
    return re.sub(r"[^\w .-]", "-", f"{client.get_experiment(experiment).name}.{name}")  # a quote would end the filter


def _versions(client: MlflowClient, name: str, stage: Stage) -> list[ModelVersion]:
    """A registered model's versions with this digest: one, or none."""
    return [version for version in client.search_model_versions(f"name='{name}'") if version.tags.get("digest") == stage.digest]


def log_missing_metrics(client: MlflowClient, run_id: str, reports: list[dict[str, float]]) -> None:
    """Training metrics of the steps that the run lacks; each report has its `step`."""
    names = {name for report in reports for name in report if name != "step"}
    known = {name: {metric.step for metric in client.get_metric_history(run_id, _metric_name(name))} for name in names}
    for report in reports:
        step = int(report["step"])
        missing = {name: value for name, value in report.items() if name != "step" and step not in known[name]}
        if missing:
            client.log_batch(run_id, metrics=metrics(missing, step))


def metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    """Values at a step as MLflow takes them."""
    now = int(time.time() * 1000)
    return [Metric(_metric_name(name), float(value), now, step) for name, value in values.items()]


def _metric_name(name: str) -> str:
    return _name(name.replace("@", "_at_"))


def _name(name: str) -> str:
    """As MLflow takes names: no other characters, no path with another form, not too long."""
    name = re.sub(r"[^\w .:/-]", "_", name)[:250]
    is_plain = posixpath.normpath(name) == name and not name.startswith(("/", "."))
    return name if is_plain else re.sub(r"^\.|/", "_", name)


def _logged_model(client: MlflowClient, experiment: str, stage: Stage, root: str, run_id: str | None = None) -> str:
    """Id of a model's one entity in the experiment, made where there is none."""
    found = client.search_logged_models([experiment], filter_string=f"tags.digest = '{stage.digest}'")
    for model in found:
        return model.model_id
    name = re.sub(r"[^\w-]", "-", stage.name)
    made = client.create_logged_model(experiment, name, run_id, _identity(stage, root), model_type=stage.model or "")
    if stage.loader is not None:
        _log_loader(client, made.model_id, stage, root)
    return client.finalize_logged_model(made.model_id, "READY").model_id


def _log_loader(client: MlflowClient, model: str, stage: Stage, root: str) -> None:
    """What `mlflow.pyfunc.load_model` needs: which of our modules loads the model, and from where. No weights, no pickle."""
    loading = Model(model_id=model).add_flavor(
        "python_function", loader_module=stage.loader, data=PLACE, python_version=platform.python_version()
    )
    with tempfile.TemporaryDirectory() as folder:
        loading.save(f"{folder}/MLmodel")
        Path(folder, PLACE).write_text(json.dumps({"uri": stage.output(root).uri, "digest": stage.digest}))
        client.log_model_artifacts(model, folder)


def _identity(stage: Stage, root: str) -> dict[str, str]:
    parents = {f"parent.{role}": f"{parent.instance}-{parent.digest}" for role, parent in stage.parents.items()}
    return {"instance": stage.instance, "digest": stage.digest, "uri": without_user(stage.output(root).uri), **parents}


def _ancestors(stage: Stage, prefix: str = "") -> Iterator[tuple[str, Stage]]:
    """(role, stage) of everything a stage is made from, the nearest last; the role of a parent's parent has a dot."""
    for role, parent in stage.parents.items():
        yield from _ancestors(parent, f"{prefix}{role}.")
        yield f"{prefix}{role}", parent


def _dataset(stage: Stage, role: str, root: str) -> DatasetInput:
    source = json.dumps({"uri": without_user(stage.output(root).uri)})
    dataset = Dataset(f"{stage.table}/{stage.name}", stage.digest, source_type="local", source=source)
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", role)])


def _flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in node.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [(f"{prefix}{name}", value)]
    return rows
