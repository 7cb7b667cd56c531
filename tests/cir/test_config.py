"""Variants over a base recipe, and what a wrong one says."""

from typing import Any

import pytest

from cir.config import TrainConfig, VariantConfig, merge
from cluster.config import validate
from cluster.errors import UserError

BASE: dict[str, Any] = {
    "text": {"library": "open_clip", "model": "ViT-B-32", "pretrained": "openai"},
    "training": {"steps": 300, "batch_size": 64, "learning_rate": 1e-3},
    "validation": {"folds": 5},
}


def load(**changes: Any) -> TrainConfig:
    return validate(TrainConfig, {**BASE, "variants": {"supervised": {}}, **changes}, "run.yaml")


def test_a_variant_is_the_base_with_its_changes_put_over_it() -> None:
    config = load(variants={"supervised": {}, "semi": {"pseudo": True, "training": {"steps": 600}, "selection": {"ratio": 1}}})
    semi = config.variant("semi")
    assert type(semi) is VariantConfig
    assert (semi.pseudo, semi.training.steps, semi.training.batch_size, semi.selection.ratio) == (True, 600, 64, 1.0)
    assert config.variant("supervised").training.steps == 300
    assert semi.validation.folds == 5


def test_the_temperature_is_learned_by_default_for_blip_alone() -> None:
    variants = {
        "clip": {},
        "blip": {"model": "blip", "text": None},
        "cold": {"model": "blip", "text": None, "temperature": "fixed"},
    }
    config = load(variants=variants)
    assert [config.variant(name).learns_temperature for name in variants] == [False, True, False]


def test_merge_leaves_its_inputs_alone() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": {"b": 9}, "d": {"e": 4}}) == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"semi": {"training": {"stepz": 1}}}}, "train.variants.semi: 1 wrong.*\n.*training.stepz"),
        ({"variants": {"semi": {"shuffle_deltas": True}}}, "'shuffle_deltas' needs 'pseudo: true'"),
        ({"variants": {"semi": {"pseudo_only": True}}}, "'pseudo_only' needs 'pseudo: true'"),
        (
            {"variants": {"vdg": {"human_deltas": False}}},
            "'human_deltas: false' leaves .* no text: it needs 'own_deltas: true'",
        ),
        ({"variants": {"a/b": {}}}, "variant 'a/b'"),
        ({"variants": {}}, "variants"),
        ({"training": {**BASE["training"], "batch_size": -1}}, "batch_size"),
        ({"validation": {"folds": 5, "fold": 5}}, "fold 5 of 5"),
        ({"validation": {"folds": 1}}, "fold 0 of 1"),
        ({"selection": {"groups": 2, "ratio": 1.0}}, "'groups' or 'ratio', not both"),
        ({"text": {"library": "transformers"}}, "needs 'weights'"),
        ({"text": {"library": "open_clip"}}, "needs 'model'"),
        ({"zero": "sound"}, "zero"),
        ({"text": None}, "model 'fusion' needs 'text'"),
        ({"loss": {"tdm": True}}, "'loss.tdm' needs 'model: blip'"),
        ({"loss": {"alpha": 0}}, "loss.alpha"),
        ({"model": "blip"}, "'text' is of model 'fusion'"),
        ({"model": "blip", "text": None, "zero": "image"}, "'zero' is of model 'fusion'"),
        ({"model": "blip", "text": None, "center": True}, "'center' is of model 'fusion'"),
    ],
)
def test_wrong_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**changes)
