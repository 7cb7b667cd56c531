"""How right deltas are, by attributes."""

import json
from pathlib import Path

import pytest

from cluster.app.checks import check
from cluster.app.config import PROJECT, load
from cluster.app.report.precision import Judge
from cluster.errors import UserError

SHIRTS = {
    0: {"kind": "shirt", "colour": "blue"},
    1: {"kind": "polo shirt", "colour": "light blue"},
    2: {"kind": "shirt", "colour": "red"},
}


@pytest.mark.parametrize(
    ("delta", "reference", "target", "fits"),
    [
        ("make it red", 0, 2, True),
        ("make it blue", 2, 0, True),
        ("make it blue", 0, 2, False),
        ("a shirt like this", 0, 2, False),  # of the target, but of the reference too
        ("make it light blue", 2, 0, False),  # the longer value is said, which is not the target's
        ("a polo shirt, please", 0, 1, True),
        ("something else", 0, 2, False),
    ],
)
def test_words_fit_what_the_target_alone_has(delta: str, reference: int, target: int, fits: bool) -> None:
    assert Judge(SHIRTS).fits(delta, SHIRTS[reference], SHIRTS[target]) == fits


@pytest.mark.parametrize("photos", ["grocery", "clothing"])
def test_the_words_of_nearly_all_labelled_deltas_fit(photos: str) -> None:
    folder = PROJECT / "tests" / "data" / photos
    attributes = json.loads((folder / "attributes.train.json").read_text())
    judge = Judge(dict(enumerate(attributes.values())))
    rows = json.loads((folder / "captions.train.json").read_text())
    fit = [judge.fits(row["captions"][0], attributes[row["reference"]], attributes[row["target"]]) for row in rows]
    assert sum(fit) / len(fit) > 0.98


def test_attributes_that_cannot_be_read_stop_a_run_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    for name, message in (("none.json", "does not exist"), ("list.json", "holds a list, expected an object")):
        with pytest.raises(UserError, match=f"report.attributes: .*{message}"):
            check(load("grocery", [f"report.attributes={tmp_path / name}"]), [])
