"""Records in a real SQLite store."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mlflow.tracking import MlflowClient

from cluster.artifacts import Output
from cluster.driver.interrupt import interrupt
from cluster.driver.mlflow_store import sqlite_uri
from cluster.driver.tracking import COMPLETE, Tracker
from cluster.monitor import Monitor
from cluster.stage import Stage
from tests.stages import simple


def nothing(output: Output, monitor: Monitor) -> None:
    """No work."""


@pytest.fixture
def pseudo_triplets() -> Stage:
    """The stage generate with all that it is made from."""

    def stage(instance: str, settings: dict, **parents: Stage) -> Stage:
        return simple(instance, 1, settings, nothing, parents)

    gallery = stage("ingest:shop", {"rows": 20})
    embeddings = stage("embed:photo.shop", {"views": {"count": 2}}, gallery=gallery)
    pairs = stage("mine:shop", {"method": "matched", "matched": {"pairs": 40}}, embeddings=embeddings)
    vdg = stage("instruct:vdg", {"vdg": {"lora_rank": 4}}, embeddings=embeddings)
    return stage("generate:shop", {"greedy": True}, pairs=pairs, vdg=vdg, embeddings=embeddings)


@pytest.fixture
def tracker(store: Path) -> Tracker:
    """A tracker on a fresh store."""
    return Tracker(sqlite_uri(store), "vdg", "run", {})


def test_pseudo_triplets_name_gallery_mining_and_generator(tracker: Tracker, pseudo_triplets: Stage, tmp_path: Path) -> None:
    run = tracker.begin(pseudo_triplets, str(tmp_path))
    run.finish({"rows": 3, "rejects": {}, "seconds": 1.0})
    record = tracker.client.get_run(run.run_id)
    expected = {"greedy": "True", "parent.pairs.method": "matched", "parent.pairs.matched.pairs": "40"}
    assert {name: record.data.params[name] for name in expected} == expected
    assert record.data.params["parent.vdg.vdg.lora_rank"] == "4"
    assert record.data.tags["parent.vdg"] == f"instruct:vdg-{pseudo_triplets.parents['vdg'].digest}"
    datasets = {(i.dataset.name, i.tags[0].value) for i in record.inputs.dataset_inputs}
    assert datasets == {
        ("dataset/shop", "embeddings.gallery"),
        ("embeddings/photo.shop", "embeddings"),
        ("pairs/shop", "pairs"),
        ("pseudo_triplets/shop", "output"),
    }
    gallery = pseudo_triplets.parents["embeddings"].parents["gallery"]
    assert gallery.digest in {i.dataset.digest for i in record.inputs.dataset_inputs}


def test_a_stage_that_is_stopped_while_it_records_ends_its_record(
    tracker: Tracker, pseudo_triplets: Stage, tmp_path: Path
) -> None:
    """A thread that is cut off in a write may leave SQLite's file locked by its connection."""
    run = tracker.begin(pseudo_triplets, str(tmp_path))
    begun, stopped = threading.Event(), threading.Event()

    class Slow(dict[str, float]):
        def items(self) -> Any:
            begun.set()
            for _ in range(50):
                time.sleep(0.01)
            return super().items()

    def record() -> None:
        try:
            run.metrics(1, Slow(loss=1.0))
            stopped.wait(10)
        except KeyboardInterrupt:
            stopped.set()

    thread = threading.Thread(target=record)
    thread.start()
    begun.wait()
    interrupt(thread)
    thread.join()
    assert stopped.is_set()
    assert [metric.value for metric in tracker.client.get_metric_history(run.run_id, "loss")] == [1.0]


def test_a_store_lost_in_the_middle_is_logged_once_and_work_goes_on(
    tracker: Tracker, pseudo_triplets: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracker.begin(pseudo_triplets, str(tmp_path))
    run.metrics(1, {"loss": 1.0})
    run.client = tracker.client = MlflowClient("http://127.0.0.1:9")  # nothing listens there
    with caplog.at_level(logging.WARNING, "cluster.driver.tracking"):
        run.metrics(2, {"loss": 0.5})
        run.metrics(3, {"loss": 0.4})
        run.finish({"rows": 3, "rejects": {}, "seconds": 1.0})
    assert [record.name for record in caplog.records].count("cluster.driver.tracking") == 1
    later = tracker.begin(pseudo_triplets, str(tmp_path))
    later.metrics(1, {"loss": 1.0})
    later.fail()
    tracker.finish("FINISHED", {})


SCHEMA = pa.schema([("n", pa.int64())])


def table(output: Output, monitor: Monitor) -> None:
    output.write_table("part-00000.parquet", pa.table({"n": [1, 2, 3]}), SCHEMA)


def train(output: Output, monitor: Monitor) -> None:
    reports: list[dict] = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5, "val_mrr": 0.3}]
    output.write_bytes("metrics.jsonl", "\n".join(map(json.dumps, reports)).encode())
    output.write_bytes("weights.safetensors", b"weights")


@pytest.fixture
def models() -> list[Stage]:
    """From labelled triplets over a generator and its pseudo triplets to a retrieval model."""
    labelled = simple("ingest:labelled", 1, {}, table)
    vdg = simple("instruct:vdg", 1, {}, train, {"triplets": labelled})
    pseudo = simple("generate:shop", 1, {}, table, {"vdg": vdg})
    return [labelled, vdg, pseudo, simple("train:semi.s1", 1, {}, train, {"triplets": labelled, "pseudo_triplets": pseudo})]


def everything(tracker: Tracker) -> dict[str, object]:
    """What the store holds, without ids and times."""
    client, shown = tracker.client, {}
    for run in client.search_runs([tracker.experiment]):
        history = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
        }
        inputs = sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs)
        edges = [m.model_id for m in run.inputs.model_inputs], [m.model_id for m in run.outputs.model_outputs]
        shown[run.info.run_id] = (run.info.status, run.data.tags, run.data.params, history, inputs, edges)
    versions = [(v.name, v.version, v.tags, v.aliases) for v in client.search_model_versions()]
    return {"runs": shown, "versions": versions, "models": len(client.search_logged_models([tracker.experiment]))}


def check_tracing(uri: str, stages: list[Stage], root: str) -> None:
    """A live run that loses the store in the middle, then `complete`, twice."""
    tracker = Tracker(uri, "vdg", "v1", {})
    for stage in stages[:2]:
        run = tracker.begin(stage, root)
        run.metrics(10, {"loss": 1.0})
        run.finish(stage.run(root, Monitor()))
    for stage in stages[2:]:  # nothing of them is recorded
        stage.run(root, Monitor())
    tracker = Tracker(uri, "vdg", "v1", {}, again=True)
    assert [tracker.complete(stage, root) for stage in stages] == [False, False, True, True]
    first = everything(tracker)
    again = Tracker(uri, "vdg", "v1", {}, again=True)
    assert not any(again.complete(stage, root) for stage in stages)
    again.client.delete_tag(again.find("tags.stage = 'train'") or "", COMPLETE)  # as if it had been cut off at the end
    assert again.complete(stages[3], root)
    assert everything(again) == first

    client = tracker.client
    ids = {stage.instance: tracker.find(f"tags.digest = '{stage.digest}'") or "" for stage in stages}
    assert [m.step for m in client.get_metric_history(ids["instruct:vdg"], "loss")] == [10, 20]
    trained = client.get_run(ids["train:semi.s1"])
    made = trained.outputs.model_outputs[0].model_id
    vdg = client.get_run(ids["instruct:vdg"]).outputs.model_outputs[0].model_id
    assert [m.model_id for m in trained.inputs.model_inputs] == [vdg]
    assert {i.dataset.digest for i in trained.inputs.dataset_inputs} == {stages[0].digest, stages[2].digest}
    assert trained.data.tags["code.commit"]
    version = client.get_model_version_by_alias("vdg.semi.s1", "run-v1")
    assert version.tags["digest"] == stages[3].digest
    assert version.tags["uri"] == stages[3].output(root).uri
    assert client.get_logged_model(made).source_run_id == ids["train:semi.s1"]


def test_what_is_missing_is_written_once(models: list[Stage], tmp_path: Path, store: Path) -> None:
    check_tracing(sqlite_uri(store), models, str(tmp_path))


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A real PostgreSQL on a free loopback port, from the system's packages; it refuses to run as root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    owner, port = "postgres" if os.geteuid() == 0 else None, free_port()
    with tempfile.TemporaryDirectory() as folder:
        if owner:
            shutil.chown(folder, owner)

        def run(program: str, *arguments: str) -> None:
            command = [str(found[-1] / program), "-D", f"{folder}/data", *arguments]
            subprocess.run(command, user=owner, cwd=folder, check=True, stdout=subprocess.DEVNULL)

        run("initdb", "--auth=trust", "--username=vdg")
        run("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", f"-h 127.0.0.1 -p {port} -k {folder}")
        try:
            yield f"postgresql+psycopg2://vdg@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "fast")


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on a free loopback port."""
    port = free_port()
    store = f"sqlite:///{tmp_path}/server.db" if request.param == "sqlite" else request.getfixturevalue("postgresql")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    lighter = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes that the test does not need
    process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path, env=lighter)
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"{uri}/health"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.5)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_keeps_the_same(server: str, models: list[Stage], tmp_path: Path) -> None:
    check_tracing(server, models, str(tmp_path))


@pytest.mark.parametrize("experiment", ["it's", 'say "x"', "50 % `off` \\ a/b:c", "größe", "x" * 200])
def test_odd_names_break_no_filter(experiment: str, models: list[Stage], tmp_path: Path, store: Path) -> None:
    config = {"sources": {"it's": "x", "../a": "y", "layers.*": "z", "": "", ".": "", "b//c": "", "n" * 300: ""}}
    uri = sqlite_uri(store)
    for stage in models:
        stage.run(str(tmp_path), Monitor())
    tracker = Tracker(uri, experiment, "run", config)
    assert [tracker.complete(stage, str(tmp_path)) for stage in models] == [True] * 4
    tracker.scored(models[3], str(tmp_path), {"R@1": 3.0, "R'1": 4.0})
    first = everything(tracker)
    again = Tracker(uri, experiment, "run", config, again=True)
    assert not any(again.complete(stage, str(tmp_path)) for stage in models)
    again.client.delete_tag(again.find("tags.stage = 'train'") or "", COMPLETE)
    assert again.complete(models[3], str(tmp_path))
    assert everything(again) == first
    assert (first["models"], len(first["versions"])) == (2, 2)


def test_runs_that_were_cut_off_are_closed(models: list[Stage], tmp_path: Path, store: Path) -> None:
    tracker = Tracker(sqlite_uri(store), "vdg", "run", {})
    for stage in models[:2]:
        tracker.begin(stage, str(tmp_path))  # a thread that waits in native code never says more
    tracker.silent_until = time.monotonic() + 60  # the store failed a moment ago
    tracker.finish("KILLED", {})
    assert [run.info.status for run in tracker.client.search_runs([tracker.experiment])] == ["KILLED"] * 3
