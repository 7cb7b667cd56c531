"""The labeller without a person."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.labeller import Labeller

DATA = Path(__file__).parents[2] / "data"
RNG = np.random.default_rng(0)


def load(name: str) -> Labeller:
    attributes, captions = (json.loads((DATA / name / f"{kind}.train.json").read_text()) for kind in ("attributes", "captions"))
    return Labeller(attributes, captions)


@pytest.fixture(scope="module")
def grocery() -> Labeller:
    return load("grocery")


def image(labeller: Labeller, **shown: str) -> str:
    """The first image of these attributes."""
    return next(key for key, row in labeller.attributes.items() if shown.items() <= row.items())


@pytest.mark.parametrize("name", ["grocery", "clothing"])
def test_it_accepts_every_text_that_the_set_has_of_its_pairs(name: str) -> None:
    labeller = load(name)
    for row in json.loads((DATA / name / "captions.oracle.json").read_text()):
        assert labeller.judge(row["reference"], row["target"], row["captions"], RNG) == ("right", row["captions"][0])


@pytest.mark.parametrize(
    ("delta", "verdict"),
    [
        ("replace with galia melon", "right"),
        ("change to melon", "right"),
        ("change to red melon", "edited"),
        ("replace with honeydew melon", "edited"),
        ("show galia melon and not organic", "edited"),
        ("", "edited"),
    ],
)
def test_a_deltas_words_have_to_fit(grocery: Labeller, delta: str, verdict: str) -> None:
    reference, target = image(grocery, variety="nectarine"), image(grocery, variety="galia melon")
    found, text = grocery.judge(reference, target, [delta], RNG)
    assert found == verdict
    assert grocery.claims(text) & {"galia melon", "melon"}


def test_what_no_text_of_the_set_says_is_wrong(grocery: Labeller) -> None:
    milk = {"kind": "Milk", "brand": "Arla", "variety": "medium fat"}
    regular, organic = image(grocery, **milk, eco="regular"), image(grocery, **milk, eco="organic")
    assert grocery.judge(regular, organic, ["not organic"], RNG)[0] == "edited"
    assert grocery.judge(regular, organic, ["must be organic"], RNG)[0] == "right"
    assert grocery.judge(regular, regular, ["must be organic"], RNG) == ("no_change", "")
    assert grocery.judge(image(grocery, variety="nectarine"), regular, ["show milk"], RNG) == ("wrong", "")
