"""Evaluation of trained models, end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save

from cir.benchmarks import cirr, triplets
from cir.benchmarks.triplets import check_attributes
from cir.config import EvaluateConfig
from cir.evaluate import RANKINGS, _check_gallery
from cir.select import Pseudo
from cluster.artifacts import Output
from cluster.config import ActorResources, WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.config import TextTower
from mining.gallery import GROUPS
from tests.cir import world
from tests.cir.benchmarks import official
from tests.cir.stages import evaluate, train_cir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: dict[str, Any], ray_session: None) -> dict[str, Any]:
    """Arguments of `evaluate` with two trained variants, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("evaluate")
    features = world.features(folder / "embeddings")
    triplets = world.triplets(folder / "labelled", world.triplet_rows(60, 0))
    pseudo = Pseudo(world.triplets(folder / "pseudo", world.triplet_rows(100, 1)))
    variants = {
        "supervised": world.variant(tiny_bert, training=steps(5)),
        "semi": world.variant(tiny_bert, pseudo=True, training=steps(80)),
    }
    models = {}
    for variant, seed in (("supervised", 0), ("semi", 0), ("semi", 1)):
        models[f"{variant}.s{seed}"] = model = Output(str(folder / f"{variant}{seed}"))
        train_cir(model, features, triplets, pseudo, variants[variant], seed, WorkerResources(workers=0), Monitor())
    (folder / "attributes.json").write_text(json.dumps(world.attributes()))
    return {
        "embeddings": features.embeddings,
        "queries": world.triplets(folder / "queries", world.triplet_rows(50, 2)),
        "gallery": world.gallery(folder / "gallery"),
        "attributes": str(folder / "attributes.json"),
        "models": models,
    }


def steps(count: int) -> dict[str, Any]:
    return {"steps": count, "batch_size": 32, "learning_rate": 3e-3}


def score(folder: Path, arguments: dict[str, Any], **fields: Any) -> Output:
    output = Output(str(folder / "evaluation"))
    config = EvaluateConfig.model_validate({"resamples": 500, **fields})
    benchmark = triplets.load(arguments["queries"], arguments["gallery"], arguments["attributes"], config)
    embeddings, gallery, models = (arguments[name] for name in ("embeddings", "gallery", "models"))
    text, resources = arguments.get("text"), ActorResources(actors=2)
    evaluate(output, benchmark, embeddings, gallery, models, text, config, resources, Monitor(), arguments.get("deltas"))
    return output


def test_metrics_gains_and_rankings(run: dict[str, Any], tmp_path: Path) -> None:
    output = score(tmp_path, run)
    metrics, gain = output.read_json("metrics.json"), output.read_json("gain.json")
    assert list(metrics) == ["supervised", "semi"]
    assert {"R@1", "R@5", "R@10", "exact R@1", "reference first"} <= set(metrics["semi"])
    semi = metrics["semi"]["R@1"]
    assert len(semi["seeds"]) == 2
    assert semi["mean"] == pytest.approx(np.mean(semi["seeds"]))
    assert gain["semi"]["mean"] == pytest.approx(semi["mean"] - metrics["supervised"]["R@1"]["mean"])
    assert gain["semi"]["low"] <= gain["semi"]["mean"] <= gain["semi"]["high"]
    assert (gain["semi"]["baseline"], gain["semi"]["metric"]) == ("supervised", "R@1")
    assert semi["mean"] > metrics["supervised"]["R@1"]["mean"] + 10  # 80 steps against 5


def test_rankings_agree_with_the_metrics(run: dict[str, Any], tmp_path: Path) -> None:
    output = score(tmp_path, run)
    ranking = output.read_table("rankings/semi.s1.parquet", RANKINGS).to_pylist()
    queries = world.triplet_rows(50, 2)
    looks = {int(world.IDS[i]): world.look(i) for i in range(world.COUNT)}
    for row, query in zip(ranking, queries, strict=True):
        assert row["triplet_id"] == query["triplet_id"]
        assert len(row["image_ids"]) == 50
        assert query["reference_id"] not in row["image_ids"]
        assert row["correct"] == [looks[i] == looks[query["target_id"]] for i in row["image_ids"]]
        if row["target_rank"] <= 50:
            assert row["image_ids"][int(row["target_rank"]) - 1] == query["target_id"]
    right = [any(row["correct"][:5]) for row in ranking]
    metrics = output.read_json("metrics.json")["semi"]
    assert metrics["R@5"]["seeds"][1] == pytest.approx(100 * np.mean(right))
    assert metrics["exact R@5"]["seeds"][1] == pytest.approx(100 * np.mean([row["target_rank"] <= 5 for row in ranking]))


def test_without_attributes_the_target_alone_is_right(run: dict[str, Any], tmp_path: Path) -> None:
    by_attributes = score(tmp_path / "a", run).read_json("metrics.json")["semi"]
    exact = score(tmp_path / "b", {**run, "attributes": None}).read_json("metrics.json")["semi"]
    assert exact["R@1"] == by_attributes["exact R@1"]
    assert exact["R@1"]["mean"] < by_attributes["R@1"]["mean"]
    assert "exact R@1" not in exact


def test_groups_give_the_rank_among_their_members(run: dict[str, Any], tmp_path: Path) -> None:
    queries = world.triplets(tmp_path / "queries", world.triplet_rows(50, 2, grouped=5))
    rows = queries.read_parts(tables.TRIPLETS).to_pylist()
    rng = np.random.default_rng(0)
    members = {}
    for group in range(9):  # the last group is not listed
        named = {row[role] for row in rows if row["group_id"] == group for role in ("reference_id", "target_id")}
        members[group] = sorted(named | set(rng.choice(world.IDS, 6).tolist()))
    table = [{"group_id": group, "image_ids": ids} for group, ids in members.items()]
    queries.write_table(GROUPS, pa.Table.from_pylist(table, tables.GROUPS), tables.GROUPS)
    output = score(tmp_path, {**run, "queries": queries}, recalls=[1, world.COUNT])
    expected = []
    ranking = output.read_table("rankings/semi.s1.parquet", RANKINGS).to_pylist()
    for row, query in zip(ranking, rows, strict=True):
        ranked = [i for i in row["image_ids"] if i in members.get(query["group_id"], [])]
        expected.append(ranked.index(query["target_id"]) + 1 if ranked else None)
    assert [row["subset_rank"] for row in ranking] == expected
    assert expected[45:] == [None] * 5
    recall = output.read_json("metrics.json")["semi"]["Rs@2"]["seeds"][1]
    assert recall == pytest.approx(100 * np.mean([rank <= 2 for rank in expected[:45]]))


def test_groups_without_their_members_give_no_subset_recall(run: dict[str, Any], tmp_path: Path) -> None:
    queries = world.triplets(tmp_path / "queries", world.triplet_rows(50, 2, grouped=5))
    output = score(tmp_path, {**run, "queries": queries})
    assert not [name for name in output.read_json("metrics.json")["semi"] if name.startswith("Rs@")]


def test_control_rows_need_no_training(run: dict[str, Any], tiny_bert: dict[str, Any], tmp_path: Path) -> None:
    untrained = {**run, "models": {}, "embeddings": world.embeddings(tmp_path / "wide", dim=32)}  # as wide as the texts'
    output = score(tmp_path / "all", {**untrained, "text": TextTower.model_validate(tiny_bert)})
    controls = output.read_json("controls.json")
    assert list(controls["metrics"]) == ["image_only", "text_only", "sum"]
    assert controls["left_out"] == {}
    assert controls["metrics"]["image_only"]["reference first"]["mean"] == 100
    assert controls["metrics"]["text_only"]["reference first"]["mean"] < 20
    assert 20 < controls["metrics"]["sum"]["reference first"]["mean"] < 100
    assert output.read_json("metrics.json") == output.read_json("gain.json") == {}  # of trained models alone
    alone = score(tmp_path / "alone", untrained).read_json("controls.json")
    assert list(alone["metrics"]) == ["image_only"]
    assert set(alone["left_out"]) == {"text_only", "sum"}


def test_models_are_scored_on_an_official_benchmark(run: dict[str, Any], tiny_clip: dict[str, Any], tmp_path: Path) -> None:
    """With vectors of its images that mean nothing to the models."""
    benchmark = cirr.load(official.annotations("cirr"), "val")
    ids, schema = np.array(list(benchmark.names)), tables.embeddings(1, world.DIM)
    embeddings = Output(str(tmp_path / "embeddings"))
    for part, chosen in enumerate(np.array_split(ids, 3)):
        values = np.random.default_rng(part).normal(size=(len(chosen), world.DIM)).astype(np.float16)
        ones = np.ones(len(chosen), np.int16)
        columns = {"image_id": chosen, "view": 0 * ones, "tokens": ones, "values": list(values)}
        embeddings.write_table(f"part-0000{part}.v0.parquet", pa.table(columns, schema=schema), schema)
    embeddings.write_json("info.json", {"tokens": 1, "dim": world.DIM, "views": 1})
    embeddings.write_bytes("mean.safetensors", save({"mean": np.zeros(world.DIM, np.float32)}))
    output, config = Output(str(tmp_path / "evaluation")), EvaluateConfig(benchmark="cirr", resamples=50)
    evaluate(output, benchmark, embeddings, run["gallery"], run["models"], None, config, ActorResources(actors=2), Monitor())
    metrics = output.read_json("metrics.json")
    assert list(metrics) == ["supervised", "semi"]
    assert len(metrics["semi"]["R@50"]["seeds"]) == 2
    assert metrics["semi"]["Rs@1"]["mean"] == pytest.approx(20, abs=3)
    assert output.read_json("gain.json")["semi"]["metric"] == "R@1"
    names = {name for protocol in output.read_json("protocols.json") for name in protocol["metrics"]}
    assert names == set(metrics["semi"])
    for model in run["models"]:
        assert len(output.read_json(f"submissions/{model}/recall.json")) == 2 + 4181
    rejected = embeddings.read_table("part-00000.v0.parquet", schema).slice(1)
    embeddings.write_table("part-00000.v0.parquet", rejected, schema)
    with pytest.raises(UserError, match=r"evaluate\.annotations: 1 image.* have no embeddings"):
        evaluate(
            output, benchmark, embeddings, run["gallery"], run["models"], None, config, ActorResources(actors=2), Monitor()
        )


def test_queries_are_asked_in_a_generators_deltas(run: dict[str, Any], tmp_path: Path) -> None:
    human = run["queries"].read_parts(tables.TRIPLETS).to_pylist()
    told, wrong = (
        world.triplets(tmp_path / name, [{**row, "deltas": texts(row), "source": "vdg"} for row in human])
        for name, texts in (("told", lambda row: row["deltas"]), ("wrong", lambda row: human[0]["deltas"]))
    )
    plain, same, other = (
        score(tmp_path / name, {**run, "deltas": deltas}) for name, deltas in (("a", None), ("b", told), ("c", wrong))
    )
    recall = [output.read_json("metrics.json")["semi"]["R@1"]["mean"] for output in (plain, same, other)]
    assert recall[0] == recall[1] > recall[2] + 10
    said = [output.read_json("protocols.json")[0]["description"] for output in (plain, same)]
    assert said[1] == said[0] + "; the texts are the generator's, which has seen the targets"


def test_a_query_that_the_generator_wrote_nothing_of_asks_nothing(run: dict[str, Any]) -> None:
    benchmark = triplets.load(run["queries"], run["gallery"], None, EvaluateConfig())
    first = benchmark.queries[0]
    asked = benchmark.asked({(first.reference, first.targets[0]): ["turn it red"]})
    pairs = {(query.reference, query.targets[0]): query.text for query in asked.queries}
    assert pairs.pop((first.reference, first.targets[0])) == "turn it red"
    assert set(pairs.values()) == {""}


def test_a_cut_off_evaluation_keeps_its_rankings(run: dict[str, Any], tmp_path: Path) -> None:
    output = score(tmp_path, run)
    kept = Path(output.path("rankings/semi.s0.parquet"))
    Path(output.path("rankings/semi.s1.parquet")).unlink()
    before, metrics = kept.stat().st_mtime_ns, output.read_json("metrics.json")
    score(tmp_path, run)
    assert kept.stat().st_mtime_ns == before
    assert output.read_json("metrics.json") == metrics


def test_attributes_are_read_from_any_filesystem(run: dict[str, Any]) -> None:
    assert check_attributes(Path(run["attributes"]).as_uri()) == world.attributes()


def test_a_gallery_of_one_image_beside_the_reference_is_refused(run: dict[str, Any]) -> None:
    benchmark = triplets.load(run["queries"], run["gallery"], None, EvaluateConfig(resamples=500))
    with pytest.raises(UserError, match=r"the gallery has 2 image\(s\): any model finds the target first"):
        _check_gallery(benchmark, 2)
    _check_gallery(benchmark, 3)


def test_wrong_inputs_are_named(run: dict[str, Any], tmp_path: Path) -> None:
    partial, broken, listed = (tmp_path / f"{name}.json" for name in ("partial", "broken", "listed"))
    listed.write_text("[]")
    partial.write_text(json.dumps({"image0": {}}))
    broken.write_text("{")
    unknown = world.triplet_rows(2, 2)
    unknown[1]["target_id"] = 77
    other = world.embeddings(tmp_path / "other", dim=8)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"queries": world.triplets(tmp_path / "none", [])}, "evaluate.triplets: .* has no triplets"),
        (
            {"queries": world.triplets(tmp_path / "unknown", unknown)},
            "evaluate.triplets: 1 image.* have no embeddings in .*, such as image_id 77",
        ),
        ({"attributes": str(tmp_path / "missing.json")}, r"evaluate\.attributes: .*missing\.json: cannot be read"),
        ({"attributes": str(broken)}, r"broken\.json: cannot be read as JSON"),
        ({"attributes": str(listed)}, "evaluate.attributes: .* holds a list, expected an object"),
        ({"attributes": str(partial)}, "has no attributes of .* target images, such as 'image"),
        ({"embeddings": other}, "was trained on one vector of width 16 .* have 1 of width 8"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            score(tmp_path, {**run, **changes})
