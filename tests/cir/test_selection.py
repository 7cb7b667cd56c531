"""Which pseudo triplets are used."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cir.config import PseudoSelection
from cir.selection import read_scores, select
from cluster.errors import UserError
from mining import tables
from tests.cir import world


def pseudo(count: int, grouped: int | None = 9) -> pa.Table:
    return pa.Table.from_pylist(world.triplet_rows(count, 1, grouped), tables.TRIPLETS)


def chosen(table: pa.Table, scores: Any = None, labelled: int = 10, **fields: Any) -> pa.Table:
    values = None if scores is None else np.asarray(scores, np.float32)
    return select(table, values, labelled, PseudoSelection.model_validate(fields))


def images(table: pa.Table) -> int:
    return len(set(table["reference_id"].to_pylist()) | set(table["target_id"].to_pylist()))


def test_nothing_asked_for_keeps_all() -> None:
    assert chosen(pseudo(20)).equals(pseudo(20))


def test_groups_are_kept_whole() -> None:
    found = chosen(pseudo(90), groups=4)
    groups = found["group_id"].to_pylist()
    assert len(found) == 36
    assert all(groups.count(g) == 9 for g in set(groups))
    assert found.equals(chosen(pseudo(90), groups=4))
    assert not found.equals(chosen(pseudo(90), groups=4, seed=1))


@pytest.mark.parametrize("grouped", [9, None])
def test_ratio_takes_units_until_the_images_are_reached(grouped: int | None) -> None:
    table = pseudo(180, grouped)
    found = chosen(table, labelled=20, ratio=1.5)
    unit = 18 if grouped else 2  # images that one more group or triplet can bring
    assert 30 <= images(found) < 30 + unit
    if grouped:
        groups = found["group_id"].to_pylist()
        assert all(groups.count(g) == 9 for g in set(groups))


def test_a_ratio_beyond_the_gallery_takes_all_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert len(chosen(pseudo(18), labelled=1000, ratio=1.0)) == 18
    assert "all are taken" in caplog.text


def test_top_fraction_and_least_score() -> None:
    table, scores = pseudo(10, None), [-0.1, -2.0, -0.3, -0.4, -5.0, -0.6, -0.7, -0.8, -0.9, -1.0]
    ids = table["triplet_id"].to_pylist()
    assert chosen(table, scores, top_fraction=0.3)["triplet_id"].to_pylist() == [ids[0], ids[2], ids[3]]
    assert chosen(table, scores, min_score=-0.6)["triplet_id"].to_pylist() == [ids[i] for i in (0, 2, 3, 5)]
    both = chosen(table, scores, min_score=-0.6, top_fraction=0.5)
    assert both["triplet_id"].to_pylist() == [ids[0], ids[2]]


def test_scores_are_read_by_triplet(tmp_path: Path) -> None:
    rows = world.triplet_rows(5, 1)
    output = world.triplets(tmp_path, rows, np.arange(5.0))
    ids = np.array([row["triplet_id"] for row in rows])
    assert read_scores(output, ids[::-1]).tolist() == [4, 3, 2, 1, 0]
    with pytest.raises(UserError, match=r"1 of 1 pseudo triplets .* have no log_probability score, such as 7"):
        read_scores(output, np.array([7]))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="none of 10 pseudo triplets is left"):
        chosen(pseudo(10), np.full(10, -3.0), min_score=-1.0)
    with pytest.raises(UserError, match="asked for 5, found 2 groups"):
        chosen(pseudo(18), groups=5)
    with pytest.raises(UserError, match="asked for 5, found 0 groups"):
        chosen(pseudo(18, None), groups=5)
