"""Jobs on a real cluster of several nodes: attempts, logs, and a run that trains both models with two workers each."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.app import config as configs
from cluster.app.graph import Graph
from cluster.app.runner import tracking_uri
from tests.cluster.local_cluster import PROJECT, LocalCluster, local_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head without work and two nodes."""
    with local_cluster(workers=2, cpus=2) as found:
        yield found


def submitted(shown: str) -> str:
    """The id that `vdg submit` names."""
    return next(line for line in shown.splitlines() if line.startswith("submitted ")).split()[1].rstrip(";")


def test_a_failed_run_says_why_and_its_next_attempt_is_numbered(cluster: LocalCluster, tmp_path: Path) -> None:
    command = ["submit", "grocery", "--local", "--set", f"root={tmp_path}", "--set", f"evaluate.images={tmp_path}/none"]
    first = submitted(cluster.vdg(*command)[1])
    logs, _ = cluster.vdg("logs", first, "--follow")
    assert f"evaluate.images: {tmp_path}/none does not exist" in logs
    assert "FAILED" in cluster.vdg("status", first)[0]
    second = submitted(cluster.vdg(*command)[1])
    assert second == f"{first}.2"
    cluster.vdg("stop", second)
    listed = cluster.vdg("jobs")[0]
    assert first in listed
    assert second in listed
    for command in (["status", "no-such-job"], ["logs", "no-such-job", "--follow"], ["stop", "no-such-job"]):
        assert "vdg jobs" in cluster.vdg(*command, status=2)[1]


def test_a_run_without_an_address_starts_a_ray_of_its_own(cluster: LocalCluster) -> None:
    code = (
        "import ray; from cluster.driver import session as s\n"
        "s.start(s.RayConfig(num_cpus=1)); print(ray.cluster_resources()['CPU'])"
    )
    environment = {**cluster.environment, "PYTHONPATH": str(PROJECT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True).stdout == b"1.0\n"


def test_a_wrong_token_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    stranger = LocalCluster(cluster.gcs, cluster.dashboard, {**cluster.environment, "RAY_AUTH_TOKEN": "0" * 32})
    assert "RAY_AUTH_TOKEN" in stranger.vdg("jobs", status=2)[1]
    command = [sys.executable, "-m", "cluster.app", "run", "demo", "--set", f"root={tmp_path}"]
    command += ["--set", f"resources.ray.address={cluster.gcs}"]
    environment = {**stranger.environment, "PYTHONPATH": str(PROJECT)}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "error: resources.ray.address" in refused.stderr


def test_both_models_train_with_two_workers_each(cluster: LocalCluster, config: str) -> None:
    semi = "{pseudo: true, selection: {drop_repeated: false}}"  # whose generator has learned next to nothing
    settings = ["align=null", "rounds.count=1", f"train.variants={{supervised: {{}}, semi: {semi}}}"]
    settings += [f"resources.{stage}.{field}" for stage in ("instruct", "train") for field in ("workers=2", "cpus=1")]
    command = ["submit", config, "--local", *(part for setting in settings for part in ("--set", setting))]
    name = submitted(cluster.vdg(*command)[1])
    assert f"vdg logs {name}" in cluster.vdg(*command, status=2)[1]  # one is enough
    logs, _ = cluster.vdg("logs", name, "--follow")
    assert "SUCCEEDED" in cluster.vdg("status", name)[0], logs
    graph = Graph(configs.load(config, settings))
    manifests = [graph.output(stage).manifest() for stage in graph.stages]
    assert {manifest["code"]["ray_submission"] for manifest in manifests if manifest} == {name}
    assert all(manifests)
    check_records(tracking_uri(graph.config), name)
    again = cluster.vdg(*command)[1]
    assert f"{name} has succeeded" in again
    for stage in graph.stages:
        assert graph.output(stage).uri in again


def check_records(uri: str, job: str) -> None:
    """MLflow's run of each stage names the job, and the longest of them have the load of the machine."""
    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()], "tags.stage != 'none'")
    assert {run.data.tags["code.ray_submission"] for run in runs} == {job}
    watched = {run.data.tags["stage"] for run in runs if "system/cpu_utilization_percentage" in run.data.metrics}
    assert {"instruct", "train"} <= watched
