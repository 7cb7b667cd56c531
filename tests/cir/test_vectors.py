"""Files of given vectors."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cir.benchmarks.benchmark import Protocol, Query, image_id
from cir.benchmarks.triplets import Triplets
from cir.vectors import Given
from cluster.errors import UserError

NAMES = {image_id(name): name for name in ("a", "b", "c")}
IDS = np.array(sorted(NAMES))
QUERIES = tuple(Query(key, i, image_id("a"), "x", (image_id("b"),)) for i, key in enumerate(("7", "8")))
BENCHMARK = Triplets(QUERIES, (Protocol("own", "", {"": IDS}, True),), NAMES)
ROWS = [
    ("query", "8", [1, 2]),
    ("gallery", "b", [3, 4]),
    ("query", "7", [5, 6]),
    ("gallery", "a", [7, 8]),
    ("gallery", "c", [9, 1]),
]


def write(path: Path, rows: list[tuple[str, str, list[float]]], kind: pa.DataType) -> Given:
    columns = [list(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.table({"kind": columns[0], "key": columns[1], "vector": pa.array(columns[2], kind)}), path)
    return Given(str(path))


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.float16())])
def test_vectors_are_found_by_key_in_any_order(tmp_path: Path, kind: pa.DataType) -> None:
    given = write(tmp_path / "v.parquet", ROWS, kind)
    given.check(BENCHMARK)
    assert given.queries(["7", "8"]).tolist() == [[5, 6], [1, 2]]
    take = given.open(np.array([image_id("c"), image_id("b")]))
    assert take(np.array([image_id(name) for name in "bcb"])).tolist() == [[3, 4], [9, 1], [3, 4]]
    ((ids, values),) = given.blocks()
    assert [NAMES[i] for i in ids.tolist()] == ["b", "a", "c"]
    assert values.dtype == np.float32


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[1:], "1 query vectors are missing, such as that of '8'"),
        (ROWS[:-1], "1 gallery vectors are missing, such as that of 'c'"),
        ([*ROWS, ROWS[0]], "1 query keys come more than once, such as '8'"),
        ([*ROWS, ("gallery", "d", [1.0])], r"vectors of widths \[2, 1\]"),
        ([*ROWS, ("gallery", "d", [1.0, float("nan")])], "the vector of 'd' is zero or not finite"),
        ([*ROWS, ("gallery", "d", [0.0, 0.0])], "the vector of 'd' is zero or not finite"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, rows: list[tuple[str, str, list[float]]], message: str) -> None:
    given = write(tmp_path / "v.parquet", rows, pa.list_(pa.float64()))
    with pytest.raises(UserError, match=rf"evaluate.embeddings: .*v.parquet: {message}"):
        given.check(BENCHMARK)


def test_other_files_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "columns.parquet")
    (tmp_path / "text.parquet").write_text("x")
    for name, message in (
        ("columns", "no column kind, vector"),
        ("text", "cannot be read as Parquet"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            Given(str(tmp_path / f"{name}.parquet")).check(BENCHMARK)
