"""Which pseudo triplets are used."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cir.config import PseudoSelection
from cir.select import Pseudo, chosen, select
from cluster.artifacts import Output
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from tests.cir import world
from tests.cir.stages import select_confident, with_own_deltas


def pseudo(count: int, grouped: int | None = 9) -> pa.Table:
    return pa.Table.from_pylist(world.triplet_rows(count, 1, grouped), tables.TRIPLETS)


def selected(table: pa.Table, scores: Any = None, labelled: int = 10, **fields: Any) -> pa.Table:
    values = None if scores is None else np.asarray(scores, np.float32)
    return select(table, values, labelled, PseudoSelection.model_validate(fields))


def chosen_by(pseudo: Pseudo, **fields: Any) -> tuple[pa.Table, np.ndarray | None]:
    return chosen(pseudo, 10, PseudoSelection.model_validate(fields))


def images(table: pa.Table) -> int:
    return len(set(table["reference_id"].to_pylist()) | set(table["target_id"].to_pylist()))


def test_nothing_asked_for_keeps_all() -> None:
    assert selected(pseudo(20)).equals(pseudo(20))


def test_groups_are_kept_whole() -> None:
    found = selected(pseudo(90), groups=4)
    groups = found["group_id"].to_pylist()
    assert len(found) == 36
    assert all(groups.count(g) == 9 for g in set(groups))
    assert found.equals(selected(pseudo(90), groups=4))
    assert not found.equals(selected(pseudo(90), groups=4, seed=1))


def test_deltas_that_repeat_themselves_are_left_out_before_anything_is_ranked(tmp_path: Path) -> None:
    rows = world.triplet_rows(10, 1, None)
    for row in rows[:4]:
        row["deltas"] = ["I want it in red and I want it in red and I want it"]
    pseudo = scored(tmp_path, rows, log_probability=[0.0] * 4 + [-float(i) for i in range(1, 7)])
    found, _ = chosen_by(pseudo, top_fraction=0.5)
    assert found["triplet_id"].to_pylist() == [row["triplet_id"] for row in rows[4:7]]
    assert len(chosen_by(pseudo, top_fraction=0.5, drop_repeated=False)[0]) == 5


@pytest.mark.parametrize("grouped", [9, None])
def test_ratio_takes_units_until_the_images_are_reached(grouped: int | None) -> None:
    table = pseudo(180, grouped)
    found = selected(table, labelled=20, ratio=1.5)
    unit = 18 if grouped else 2  # images that one more group or triplet can bring
    assert 30 <= images(found) < 30 + unit
    if grouped:
        groups = found["group_id"].to_pylist()
        assert all(groups.count(g) == 9 for g in set(groups))


def test_a_ratio_beyond_the_gallery_takes_all_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert len(selected(pseudo(18), labelled=1000, ratio=1.0)) == 18
    assert "all are taken" in caplog.text


def test_top_fraction_and_least_score() -> None:
    table, scores = pseudo(10, None), [-0.1, -2.0, -0.3, -0.4, -5.0, -0.6, -0.7, -0.8, -0.9, -1.0]
    ids = table["triplet_id"].to_pylist()
    assert selected(table, scores, top_fraction=0.3)["triplet_id"].to_pylist() == [ids[0], ids[2], ids[3]]
    assert selected(table, scores, min_score=-0.6)["triplet_id"].to_pylist() == [ids[i] for i in (0, 2, 3, 5)]
    both = selected(table, scores, min_score=-0.6, top_fraction=0.5)
    assert both["triplet_id"].to_pylist() == [ids[0], ids[2]]


def scored(folder: Path, rows: list[dict[str, Any]], **values: list[float]) -> Pseudo:
    """Pseudo triplets with the scores of each scorer, where `generate` and `score` keep them."""
    output = world.triplets(folder / "generate", rows)
    ids = [row["triplet_id"] for row in rows]
    judged = Output(str(folder / "score"))
    for name, scores in values.items():
        table = pa.table([ids, [name] * len(ids), np.float32(scores)], schema=tables.SCORES)
        if name == tables.ROUND_TRIP:
            judged.write_table("part-00000.parquet", table, tables.SCORES)
        else:
            output.write_table(f"scores/part-0000{len(output.names('scores'))}.parquet", table, tables.SCORES)
    return Pseudo(output, judged)


def test_scores_are_read_by_triplet(tmp_path: Path) -> None:
    rows = world.triplet_rows(5, 1)
    ids = np.array([row["triplet_id"] for row in rows])
    pseudo = scored(tmp_path, rows, log_probability=[0, 1, 2, 3, 4], round_trip=[-5, -4, -3, -2, -1])
    assert pseudo.scores(ids[::-1], ("log_probability",)).tolist() == [4, 3, 2, 1, 0]
    assert pseudo.scores(ids, ("round_trip",)).tolist() == [-5, -4, -3, -2, -1]
    with pytest.raises(UserError, match=r"1 of 1 pseudo triplets .* have no log_probability score, such as 7; generate them"):
        pseudo.scores(np.array([7]), ("log_probability",))
    with pytest.raises(UserError, match=r"5 of 5 .* have no agreement score, .*; set generate.samples to at least 2"):
        pseudo.scores(ids, ("round_trip", "agreement"))
    with pytest.raises(UserError, match="no round_trip score"):
        Pseudo(pseudo.triplets).scores(ids, ("round_trip",))


def test_several_scorers_count_alike_whatever_their_units(tmp_path: Path) -> None:
    rows = world.triplet_rows(4, 1)
    ids = np.array([row["triplet_id"] for row in rows])
    pseudo = scored(tmp_path, rows, log_probability=[-0.4, -0.3, -0.2, -0.1], round_trip=[-1000, 0, -10, -10])
    both = pseudo.scores(ids, ("log_probability", "round_trip"))
    np.testing.assert_allclose(both, (np.array([1, 3, 5, 7]) / 8 + np.array([1, 7, 4, 4]) / 8) / 2)


def test_weights_follow_the_scores_of_the_kept(tmp_path: Path) -> None:
    rows = world.triplet_rows(4, 1)
    pseudo = scored(tmp_path, rows, log_probability=[-4, -3, -2, -1])
    table, weights = chosen_by(pseudo, top_fraction=0.5, weight_power=2)
    assert table["triplet_id"].to_pylist() == [row["triplet_id"] for row in rows[2:]]
    np.testing.assert_allclose(weights, np.array([25, 49]) / 74)
    assert chosen_by(pseudo)[1] is None
    assert chosen_by(pseudo, top_fraction=0.5)[1] is None


def test_own_deltas_join_the_captions_of_their_pairs(tmp_path: Path) -> None:
    rows = world.triplet_rows(3, 1)
    labelled = world.triplets(tmp_path / "labelled", rows)
    own = [{**rows[1], "triplet_id": 1, "deltas": ["turn it red"], "source": "vdg"}]
    output = Output(str(tmp_path / "select"))
    with_own_deltas(output, labelled, world.triplets(tmp_path / "generated", own), Monitor())
    found = output.read_parts(tables.TRIPLETS).to_pylist()
    assert found == [rows[0], {**rows[1], "deltas": [*rows[1]["deltas"], "turn it red"]}, rows[2]]


def test_own_deltas_stand_alone_and_pairs_without_one_are_left_out(tmp_path: Path) -> None:
    rows = world.triplet_rows(3, 1)
    labelled = world.triplets(tmp_path / "labelled", rows)
    own = [{**rows[1], "triplet_id": 1, "deltas": ["turn it red"], "source": "vdg"}]
    output = Output(str(tmp_path / "select"))
    with_own_deltas(output, labelled, world.triplets(tmp_path / "generated", own), Monitor(), alone=True)
    assert output.read_parts(tables.TRIPLETS).to_pylist() == [{**rows[1], "deltas": ["turn it red"]}]


def test_confident_triplets_join_the_labelled(tmp_path: Path) -> None:
    rows = world.triplet_rows(6, 1)
    pseudo = scored(tmp_path, rows, log_probability=[0, 1, 2, 3, 4, 5])
    labelled, output = world.triplets(tmp_path / "labelled", world.triplet_rows(3, 2)), Output(str(tmp_path / "select"))
    select_confident(output, pseudo, labelled, PseudoSelection(top_fraction=0.5), Monitor())
    found = output.read_parts(tables.TRIPLETS)["triplet_id"].to_pylist()
    assert found == [row["triplet_id"] for row in [*world.triplet_rows(3, 2), *rows[3:]]]


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="none of 10 pseudo triplets is left"):
        selected(pseudo(10), np.full(10, -3.0), min_score=-1.0)
    with pytest.raises(UserError, match="asked for 5, found 2 groups"):
        selected(pseudo(18), groups=5)
    with pytest.raises(UserError, match="asked for 5, found 0 groups"):
        selected(pseudo(18, None), groups=5)
