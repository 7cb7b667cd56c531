"""The graph that a config gives, where the generator's backbone decides what it needs."""

import pytest

from cluster.app.config import RunConfig, load
from cluster.app.pipeline import Pipeline
from cluster.artifacts import Stage
from cluster.errors import UserError

GALLERIES = [f"ingest.galleries.{name}={{images: {name}}}" for name in ("shop", "mined")]
IMAGE_TEXT = ["vdg.backbone=image_text", "vdg.tower=null", "align=null"]


def grocery(*assignments: str) -> RunConfig:
    return load("grocery", list(assignments))


def parents(stage: Stage) -> set[str]:
    return {parent.instance for parent in stage.parents.values()}


def test_a_generator_of_features_sees_through_its_tower() -> None:
    pipeline = Pipeline(grocery())
    assert parents(pipeline.generator()) == {"ingest:labelled", "embed:photo.photos", "align:vdg"}
    assert parents(pipeline.pseudo_triplets()) == {"mine:photos", "instruct:vdg", "embed:photo.photos"}


def test_a_generator_of_pixels_needs_no_embeddings() -> None:
    pipeline = Pipeline(grocery(*IMAGE_TEXT))
    assert parents(pipeline.generator()) == {"ingest:labelled", "ingest:photos"}
    assert parents(pipeline.pseudo_triplets()) == {"mine:photos", "instruct:vdg", "ingest:photos"}
    assert "align" not in {stage.kind for stage in pipeline.stages}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["vdg.tower=null"], "'features' needs the name of a tower"),
        (["vdg.backbone=image_text", "align=null"], "'image_text' sees with its own; found 'photo'"),
        (IMAGE_TEXT[:2], "no projection to align"),
        (["generate.samples=3", "generate.views=true", "embed.views.count=1"], "the plain view alone is cached"),
        (["vdg.tower=none"], "'none' is not defined"),
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
        return Pipeline(grocery(views, *GALLERIES)).features("photo", "shop", "mined")

    with pytest.raises(UserError, match=r"'photo\.shop' and 'photo\.mined', .* 3 and 2 cached views; give 'photo\.mined'"):
        features("{count: 3}", "{count: 2}")
    with pytest.raises(UserError, match="have 3 and 1 cached views"):
        features("{count: 3}", "{online: true}")
    assert features("{count: 2}", "{count: 3}")
    assert features("{online: true}", "{count: 1}")


ROUND_TRIP = "train.variants.semi.selection={scorers: [round_trip], top_fraction: 0.5}"


def test_a_second_round_learns_from_deltas_that_a_model_of_the_first_finds_right() -> None:
    pipeline = Pipeline(grocery("rounds.count=2", ROUND_TRIP))
    assert parents(pipeline.generator(2)) == {"select:vdg.r2", "embed:photo.photos", "align:vdg"}
    confident = next(stage for stage in pipeline.stages if stage.instance == "select:vdg.r2")
    assert parents(confident) == {"ingest:labelled", "generate:photos", "score:photos.semi.r1.s0"}
    early, late = pipeline.model("semi", 0, 1), pipeline.model("semi", 0)
    assert parents(early) >= {"generate:photos", "score:photos.supervised.s0"}
    assert parents(late) >= {"generate:photos.r2", "score:photos.r2.semi.r1.s0"}
    order = [stage.instance for stage in pipeline.stages]
    assert len(order) == len(set(order))
    for stage in pipeline.stages:
        assert all(order.index(parent) < order.index(stage.instance) for parent in parents(stage))


def test_one_round_is_the_paper_s_and_a_variant_may_stay_in_it() -> None:
    plain, two = Pipeline(grocery()), Pipeline(grocery("rounds.count=2", "train.variants.semi.round=1"))
    assert not {"score", "select"} & {stage.kind for stage in plain.stages}
    assert "generate:photos" in parents(two.model("semi", 0))
    assert parents(two.model("supervised", 0)) == parents(plain.model("supervised", 0))


def test_own_deltas_are_written_for_the_labelled_pairs() -> None:
    pipeline = Pipeline(grocery("train.variants.semi.own_deltas=true"))
    (extended,) = [stage for stage in pipeline.model("semi", 0).parents.values() if stage.kind == "select"]
    assert parents(extended) == {"ingest:labelled", "generate:labelled"}
    assert parents(extended.parents["pseudo_triplets"]) == {"mine:labelled", "instruct:vdg", "embed:photo.photos"}


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
    made = Pipeline(config).pseudo_triplets()
    assert made.max_reject_fraction == 0.7
    assert made.digest == Pipeline(grocery()).pseudo_triplets().digest
    assert Pipeline(config).pairs.max_reject_fraction != 0.7
