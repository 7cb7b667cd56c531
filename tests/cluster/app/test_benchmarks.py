"""`vdg evaluate` on an official benchmark: given embeddings, without images or a model."""

from pathlib import Path

import pytest

from cir.benchmarks import cirr
from cluster.app import config as configs
from cluster.app.graph import Graph
from tests.cir.benchmarks import official
from tests.cluster.app.test_cli import fail, invoke

TRIPLETS_OFF = [f"evaluate.{name}=null" for name in ("images", "triplets", "attributes")]  # of the preset


def arguments(*assignments: str) -> list[str]:
    return [part for assignment in (*TRIPLETS_OFF, *assignments) for part in ("--set", assignment)]


def test_random_embeddings_give_cirrs_closed_form(tmp_path: Path, store: Path, ray_session: None) -> None:
    folder = official.annotations("cirr")
    benchmark = cirr.load(folder, "val")
    file = official.write_vectors(tmp_path / "random.parquet", benchmark, *official.random_vectors(benchmark, dim=64))
    given = [
        f"root={store.parent}",
        "evaluate.benchmark=cirr",
        f"evaluate.annotations={folder}",
        f"evaluate.embeddings={file}",
    ]
    shown = invoke("evaluate", "grocery", *arguments(*given))
    graph = Graph(configs.load("grocery", [*TRIPLETS_OFF, *given]))
    assert [stage.instance for stage in graph.stages] == ["ingest:queries", "evaluate:all"]
    output = graph.output(graph.evaluation)
    found, count = official.means(output), len(benchmark.queries)
    restricted = benchmark.protocols[1]
    for suffix, images in (("", 2297), (f" ({restricted.label})", 2265)):
        chance = {k: k / (images - 1) for k in (1, 5, 10, 50)}  # the reference is removed
        for k, probability in chance.items():
            assert official.within_error(found[f"R@{k}{suffix}"], probability, count), (k, suffix)
        assert found[f"Avg{suffix}"] == pytest.approx((found[f"R@5{suffix}"] + found["Rs@1"]) / 2)
    for k in (1, 2, 3):
        assert official.within_error(found[f"Rs@{k}"], k / 5, count)
    assert official.within_error(found["reference first"], 1 / 2297, count)
    flowing = " ".join(shown.split())
    for text in ("CIRR rc2 val", "2,297", "2,265", "image_only", "no row text_only"):
        assert text in flowing
    submission = output.read_json("submissions/embeddings/recall.json")
    assert len(submission) == 2 + count


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["evaluate.benchmark=cirr", "evaluate.annotations=x"], "benchmark 'cirr' needs 'images'"),
        (["evaluate.benchmark=circo", "evaluate.images=x"], "benchmark 'circo' needs 'annotations'"),
        (["evaluate.benchmark=triplets", "evaluate.images=x"], "benchmark 'triplets' needs 'triplets'"),
        (
            ["evaluate.benchmark=cirr", "evaluate.annotations=x", "evaluate.images=x", "evaluate.attributes=x"],
            "'attributes' is not for benchmark 'cirr'",
        ),
        (["evaluate.images=x", "evaluate.triplets=x", "evaluate.embeddings=x"], "'embeddings' is not for benchmark 'triplets'"),
        (["evaluate.benchmark=fashioniq", "evaluate.part=test"], "part 'test': fashioniq has no server"),
        (["evaluate.benchmark=cirr", "evaluate.part=test", "evaluate.own_deltas=true"], "test's targets are hidden"),
        (
            ["evaluate.benchmark=cirr", "evaluate.annotations=x", "evaluate.embeddings=x", "evaluate.own_deltas=true"],
            "'own_deltas' needs models",
        ),
        (["evaluate.benchmark=circo", "evaluate.remove_reference=true"], "'remove_reference' is for fashioniq alone"),
    ],
)
def test_what_a_benchmark_needs_and_forbids(assignments: list[str], expected: str) -> None:
    assert expected in fail("evaluate", "grocery", *arguments(*assignments))


def test_missing_files_are_named_before_any_work(tmp_path: Path) -> None:
    given = [
        "evaluate.benchmark=circo",
        f"evaluate.annotations={tmp_path}",
        f"evaluate.images={tmp_path}",
        f"root={tmp_path}/root",
    ]
    message = fail("evaluate", "grocery", *arguments(*given))
    assert f"evaluate.annotations: {tmp_path}/annotations/val.json does not exist" in message
    assert f"{tmp_path}/COCO2017_unlabeled/annotations/image_info_unlabeled2017.json does not exist" in message
    assert not (tmp_path / "root").exists()


def test_the_same_models_are_scored_on_another_benchmark(tmp_path: Path) -> None:
    folder = official.annotations("fashioniq")
    given = ["evaluate.benchmark=fashioniq", f"evaluate.annotations={folder}", f"evaluate.images={tmp_path}"]
    before, after = (
        {stage.instance: stage.digest for stage in Graph(configs.load("grocery", assignments)).stages}
        for assignments in ([], [*TRIPLETS_OFF, *given])
    )
    changed = {instance for instance in before if before[instance] != after[instance]}
    assert changed == {"ingest:evaluate", "ingest:queries", "embed:photo.evaluate", "evaluate:all"}


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("{library: open_clip, weights: {hub: a/clip, revision: x}}", True),
        ("{library: open_clip, weights: {hub: a/clip, revision: y}}", False),
        ("{library: transformers, weights: {hub: a/clip, revision: x}}", False),
    ],
)
def test_text_rows_need_the_other_side_of_the_image_tower(text: str, shared: bool) -> None:
    tower = "embed.towers.photo={library: open_clip, model: ViT-B-32, weights: {hub: a/clip, revision: x}}"
    graph = Graph(configs.load("grocery", [tower, f"train.text={text}"]))
    assert ("text" in graph.evaluation.settings) is shared
