"""Figures of an evaluation from its models' values."""

import numpy as np
import pytest

from cir import figures
from cir.config import EvaluateConfig
from cir.train import ModelName

CONFIG = EvaluateConfig(resamples=50)


def values(share: float) -> figures.Figures:
    return {"R@1": (np.arange(100) < share).astype(float)}


MODELS = {
    "supervised.s1": values(12),
    "supervised.s0": values(10),
    "semi.g7.s0": values(40),
    "semi.s0": values(20),
    "semi.s1": values(22),
    "semi.g7.s1": values(44),
    "oracle.s0": values(50),
}


def test_names_are_read_and_ordered() -> None:
    assert ModelName.parse("semi.g7.s10") == ("semi", 7, 10)
    names = sorted(MODELS, key=ModelName.parse)
    assert names == ["oracle.s0", "semi.s0", "semi.s1", "semi.g7.s0", "semi.g7.s1", "supervised.s0", "supervised.s1"]


def test_the_models_of_a_variant_are_those_of_all_its_generators() -> None:
    table = figures.by_variant(MODELS)
    assert list(table) == ["supervised", "semi", "oracle"]
    assert table["semi"]["R@1"]["seeds"] == pytest.approx([20, 22, 40, 44])
    assert table["semi"]["R@1"]["mean"] == pytest.approx(31.5)


def test_gains_are_over_generators_and_so_are_shares_of_the_gap() -> None:
    found = figures.gains(MODELS, CONFIG, np.arange(100))
    assert list(found) == ["semi", "oracle"]
    assert (found["semi"]["generators"], found["oracle"]["generators"]) == (2, 1)
    assert found["semi"]["mean"] == pytest.approx(31.5 - 11)
    assert found["semi"]["gap"]["mean"] == pytest.approx(20.5 / 39)
    assert found["semi"]["low"] < found["semi"]["mean"] < found["semi"]["high"]
    assert figures.gains({"semi.s0": values(20)}, CONFIG, np.arange(100)) == {}
