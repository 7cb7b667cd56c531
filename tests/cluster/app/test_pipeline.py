"""The graph that a config gives, where the generator's backbone decides what it needs."""

import pytest

from cluster.app.config import RunConfig, load
from cluster.app.pipeline import Pipeline
from cluster.artifacts import Stage
from cluster.errors import UserError

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


def test_rejects_of_generate_have_a_limit_of_their_own() -> None:
    config = grocery("generate.max_reject_fraction=0.7")
    made = Pipeline(config).pseudo_triplets()
    assert made.max_reject_fraction == 0.7
    assert made.digest == Pipeline(grocery()).pseudo_triplets().digest
    assert Pipeline(config).pairs.max_reject_fraction != 0.7
