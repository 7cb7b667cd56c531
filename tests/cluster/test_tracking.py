"""Records in a real SQLite store."""

import logging
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.artifacts import Output, Stage
from cluster.monitor import Monitor
from cluster.tracking import Tracker


def nothing(output: Output, monitor: Monitor) -> None:
    """No work."""


@pytest.fixture
def pseudo_triplets() -> Stage:
    """The stage generate with all that it is made from."""

    def stage(instance: str, settings: dict, **parents: Stage) -> Stage:
        return Stage(instance, 1, settings, nothing, parents)

    gallery = stage("ingest:shop", {"rows": 20})
    embeddings = stage("embed:photo.shop", {"views": {"count": 2}}, gallery=gallery)
    pairs = stage("mine:shop", {"method": "matched", "matched": {"pairs": 40}}, embeddings=embeddings)
    vdg = stage("instruct:vdg", {"vdg": {"lora_rank": 4}}, embeddings=embeddings)
    return stage("generate:shop", {"greedy": True}, pairs=pairs, vdg=vdg, embeddings=embeddings)


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    """A tracker on a fresh store."""
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", "vdg", "run", {})


def test_pseudo_triplets_name_gallery_mining_and_generator(tracker: Tracker, pseudo_triplets: Stage, tmp_path: Path) -> None:
    run = tracker.begin(pseudo_triplets, str(tmp_path))
    run.finish(pseudo_triplets, str(tmp_path), {"rows": 3, "rejects": {}, "seconds": 1.0})
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


def test_a_store_lost_in_the_middle_is_logged_once_and_work_goes_on(
    tracker: Tracker, pseudo_triplets: Stage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracker.begin(pseudo_triplets, str(tmp_path))
    run.metrics(1, {"loss": 1.0})
    run.client = tracker.client = MlflowClient("http://127.0.0.1:9")  # nothing listens there
    with caplog.at_level(logging.WARNING, "cluster.tracking"):
        run.metrics(2, {"loss": 0.5})
        run.metrics(3, {"loss": 0.4})
        run.finish(pseudo_triplets, str(tmp_path), {"rows": 3, "rejects": {}, "seconds": 1.0})
    assert [record.name for record in caplog.records].count("cluster.tracking") == 1
    later = tracker.begin(pseudo_triplets, str(tmp_path))
    later.metrics(1, {"loss": 1.0})
    later.fail()
    tracker.finish("FINISHED", {})
