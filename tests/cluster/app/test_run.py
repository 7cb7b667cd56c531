"""The whole flow on real photos with tiny models and the real engines, in the driver's process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from cluster.app import config as configs
from cluster.app import runner
from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.errors import UserError
from tests.cluster.app.test_cli import RUNNER, app, invoke


def children(graph: Graph) -> list[Any]:
    """The stage runs of the first driver's run, by name."""
    client = MlflowClient(runner.tracking_uri(graph.config))
    experiment = client.get_experiment_by_name("vdg")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return [run for run in runs if "mlflow.parentRunId" in run.data.tags]


def test_every_stage_has_a_manifest_and_the_report_exists(finished: Graph) -> None:
    assert all(finished.output(stage).manifest() for stage in finished.stages)
    folder = runner.run_folder(finished.config)
    metrics = folder.read_json("metrics.json")
    assert set(metrics) == {"supervised", "semi", "best"}
    for row in metrics.values():
        for name in ("R@1", "R@5", "R@10"):
            assert row[name]["mean"] == pytest.approx(sum(row[name]["seeds"]) / len(row[name]["seeds"]))
            assert 0 <= row[name]["mean"] <= 100
    assert "R@1" in folder.read_bytes("report.html").decode()


def test_pseudo_triplets_carry_their_pairs(finished: Graph) -> None:
    from mining import tables

    pairs = finished.output(finished["mine:photos"]).read_parts(tables.PAIRS)
    pseudo = finished.output(finished["generate:photos"])
    written = pseudo.read_parts(tables.TRIPLETS)
    assert len(written) + len(pseudo.rejects()) == len(pairs)
    by_id = {row["pair_id"]: row for row in pairs.to_pylist()}
    for row in written.to_pylist():
        assert row["reference_id"] == by_id[row["pair_id"]]["reference_id"]
        assert row["deltas"][0]


def test_mlflow_names_what_each_model_was_made_from(finished: Graph) -> None:
    runs = {run.info.run_name: run for run in children(finished)}
    assert set(runs) == {stage.instance for stage in finished.stages}
    model = runs["train:semi.s0"]
    pseudo = finished["generate:photos"]
    assert {(i.dataset.name, i.dataset.digest) for i in model.inputs.dataset_inputs} >= {
        ("pseudo_triplets/photos", pseudo.digest)
    }
    assert model.data.tags["parent.pseudo_triplets"] == f"{pseudo.instance}-{pseudo.digest}"
    assert "loss" in model.data.metrics
    writer = runs["generate:photos"]
    assert writer.data.tags["parent.vdg"] == f"instruct:vdg-{finished['instruct:vdg'].digest}"
    assert {i.dataset.name for i in writer.inputs.dataset_inputs} >= {"pairs/photos", "embeddings/photo.photos"}
    assert "pseudo_triplets/photos" in {i.dataset.name for i in writer.inputs.dataset_inputs}
    assert all(run.info.status == "FINISHED" for run in runs.values())


def test_mlflow_has_the_runs_parameters_report_and_scores(finished: Graph, tmp_path: Path) -> None:
    client = MlflowClient(runner.tracking_uri(finished.config))
    experiment = client.get_experiment_by_name("vdg")
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    (parent,) = [run for run in client.search_runs([experiment.experiment_id]) if "vdg.run" in run.data.tags]
    assert parent.data.params["train.tower"] == finished.config.train.tower
    for name in ("report.html", "metrics.json"):
        kept = Path(client.download_artifacts(parent.info.run_id, name, str(tmp_path))).read_bytes()
        assert kept == runner.run_folder(finished.config).read_bytes(name)
    digest = finished["train:semi.s0"].digest
    (model,) = client.search_logged_models([experiment.experiment_id], filter_string=f"tags.digest = '{digest}'")
    found = {metric.key: metric.value for metric in model.metrics or ()}
    expected = runner.metrics_of(finished)["semi"]["R@1"]["seeds"][0]
    assert found["R_at_1"] == expected
    (version,) = client.search_model_versions("name='vdg.semi.s0'")
    assert version.tags["R_at_1"] == f"{expected:.1f}"


def test_track_writes_a_damaged_store_anew(finished: Graph, config: str, tmp_path: Path) -> None:
    """From the manifests, the outputs and the run's files."""
    root = Path(shutil.copytree(finished.root, tmp_path / "root"))
    (root / "mlflow.db").write_bytes(b"no database" * 999)
    shutil.rmtree(root / "mlartifacts")
    shown = invoke("track", config, "--set", f"root={root}")
    assert f"{root}/mlflow.db.damaged-1" in " ".join(shown.split())
    again = Graph(configs.load(config, [f"root={root}"]))
    assert {run.info.run_name for run in children(again)} == {stage.instance for stage in finished.stages}
    client = MlflowClient(runner.tracking_uri(again.config))
    runs = client.search_runs(["1"], max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "vdg.run" in run.data.tags]
    assert "semi/R_at_1" in parent.data.metrics
    for name in ("config.json", "report.html", "metrics.json"):
        assert client.download_artifacts(parent.info.run_id, name, str(tmp_path))
    (version,) = client.search_model_versions("name='vdg.semi.s0'")
    assert "R_at_1" in version.tags
    assert "0 of" in invoke("track", config, "--set", f"root={root}")


def test_the_same_command_again_does_nothing(finished: Graph, config: str) -> None:
    before = len(children(finished))
    again = Graph(configs.load(config, []))
    runner.run(again, again.stages)
    assert len(children(finished)) == before


def test_evaluation_on_other_queries_reuses_the_models_and_prints_json_alone(finished: Graph, world: Path, config: str) -> None:
    other = world / "other.json"
    other.write_text(json.dumps(json.loads((world / "triplets.json").read_text())[:10]))
    kept = runner.run_folder(finished.config).read_bytes("config.yaml")
    before = len(children(finished))
    result = RUNNER.invoke(app, ["evaluate", config, "--set", f"evaluate.triplets={other}", "--json"], catch_exceptions=False)
    assert len(children(finished)) == before + 2  # the queries and the evaluation
    printed = json.loads(result.stdout)
    assert set(printed) == {"supervised", "semi", "best"}
    assert set(printed["semi"]["R@1"]) == {"mean", "seeds"}
    assert runner.run_folder(finished.config).read_bytes("config.yaml") == kept  # `vdg clean` still knows the run


def test_the_report_is_written_again_from_finished_stages(finished: Graph, config: str) -> None:
    folder = runner.run_folder(finished.config)
    page = folder.read_bytes("report.html")
    folder.write_bytes("report.html", b"")
    invoke("report", config)
    assert folder.read_bytes("report.html") == page


def test_sweep_shows_a_metric_for_each_point(finished: Graph, config: str) -> None:
    shown = invoke("sweep", config, "--grid", "train.hidden=4,8", "--folds", "2", "--metric", "val_R@10")
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["4", "8"]
    for _, mean, folds in rows:
        values = [float(value) for value in folds.split()]
        assert len(values) == 2
        assert float(mean) == pytest.approx(sum(values) / 2, abs=1e-3)


def test_too_many_rejects_stop_the_run_and_name_the_first(finished: Graph, world: Path, config: str) -> None:
    broken = world / "broken.json"
    broken.write_text(json.dumps([{"reference": "ghost", "target": "ghost", "captions": ["x"]}]))
    graph = Graph(configs.load(config, [f"evaluate.triplets={broken}"]))
    with pytest.raises(UserError, match=r"ingest:queries: 1 of 1 rows were rejected.*unknown_image"):
        runner.run(graph, graph.select("evaluate", None, None))


def test_the_models_of_a_run_are_asked_in_the_generators_deltas(finished: Graph, config: str) -> None:
    from mining import tables

    asked = ["--set", "evaluate.own_deltas=true"]
    shown = invoke("evaluate", config, *asked)
    graph = Graph(configs.load(config, asked[1:]))
    written = graph.output(graph["generate:queries"]).read_parts(tables.TRIPLETS)
    assert 0 < len(written) <= sum(graph.output(graph["mine:queries"]).part_rows().values())
    assert "the texts are the generator's" in " ".join(shown.split())


def test_the_generator_ranks_the_best_images_again_in_rows_beside_the_others(finished: Graph, config: str) -> None:
    before = runner.metrics_of(finished)
    again = ["--set", "evaluate.rerank.top=5", "--set", "name=again"]
    assert "supervised+rerank" in invoke("run", config, *again)
    graph = Graph(configs.load(config, again[1::2]))
    assert graph.evaluation.digest == finished.evaluation.digest
    folder = runner.run_folder(graph.config)
    metrics = folder.read_json("metrics.json")
    assert {name: row for name, row in metrics.items() if "+" not in name} == before
    assert set(metrics) - set(before) == {f"{name}+rerank" for name in graph.config.rivals}
    page = folder.read_bytes("report.html").decode()
    assert all(f"{name}+rerank" in page for name in graph.config.rivals)
    assert Run.open(graph.root, "again").metrics() == metrics
