"""The table of neighbours: the same from any pool of actors, in whichever parts, and read as arrays."""

from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts import Output
from cluster.config import ActorResources, TaskResources
from mining import tables
from mining.config import IndexConfig, MatchedConfig, MineConfig
from mining.features import centred
from mining.neighbours import REPORT, read_neighbours
from mining.search import Exact, neighbours_of
from tests.conftest import Recorder
from tests.mining.stages import find_neighbours, mine_pairs
from tests.mining.test_mine import WALK, clustered, embeddings

CENTRED = MineConfig(gallery="g", tower="t", method="matched", triplets="t", matched=MatchedConfig(neighbours=7))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mining.neighbours.BLOCK", 150)


@pytest.mark.parametrize("config", [WALK, CENTRED])
def test_the_table_has_the_nearest_and_their_cosines(
    ray_session: None, tmp_path: Path, monitor: Recorder, config: MineConfig
) -> None:
    values = clustered(400)
    output = find_neighbours(Output(str(tmp_path / "n")), embeddings(tmp_path / "e", values), None, config, monitor=monitor)
    assert (monitor.total, monitor.advanced) == (400, 400)
    top = 20 if config is WALK else 7
    assert output.read_json(REPORT) == {"index": "exact", "images": 400, "top": top, "recall": 1.0}
    mean = np.zeros(1) if config is WALK else values.mean(axis=0)
    vectors = centred(values.astype(np.float16).astype(np.float32), mean).astype(np.float32)
    rows, cosines = neighbours_of(Exact(vectors), np.arange(400), top)
    table = output.read_parts(tables.NEIGHBOURS)
    assert table["image_id"].to_pylist() == [1000 * (i + 1) for i in range(400)]
    assert np.array_equal(np.array(table["neighbour_ids"].to_pylist()), 1000 * (rows + 1))
    nearest = read_neighbours(output)
    assert np.array_equal(nearest.rows, rows)
    assert np.allclose(nearest.cosines, cosines, atol=1e-6)


def test_any_number_of_actors_gives_the_same_pairs(ray_session: None, tmp_path: Path, small_blocks: None) -> None:
    source = embeddings(tmp_path / "e", clustered(400))
    lists = WALK.model_copy(update={"index": IndexConfig(kind="ivf")})
    for config in (WALK, CENTRED, lists):
        tables_of = []
        for actors in (1, 2):
            output = Output(str(tmp_path / f"{config.method}-{config.index.kind}-{actors}"))
            find_neighbours(output, source, None, config, ActorResources(actors=actors, cpus=0.25))
            tables_of.append(output.hashes(output.files()))
        assert tables_of[0] == tables_of[1]


def test_a_killed_search_goes_on_from_its_parts(
    ray_session: None, tmp_path: Path, monitor: Recorder, small_blocks: None
) -> None:
    source, output = embeddings(tmp_path / "e", clustered(400)), Output(str(tmp_path / "n"))
    find_neighbours(output, source, None, WALK)
    before = output.hashes(output.parts())
    assert len(before) == 3
    (tmp_path / "n" / "part-00001.parquet").unlink()
    kept = (tmp_path / "n" / "part-00000.parquet").stat().st_mtime_ns
    find_neighbours(output, source, None, WALK, monitor=monitor)
    assert (monitor.total, monitor.resumed, monitor.advanced) == (400, 267, 133)
    assert (tmp_path / "n" / "part-00000.parquet").stat().st_mtime_ns == kept
    assert output.hashes(output.parts()) == before


def test_fewer_images_than_places_leave_places_free(ray_session: None, tmp_path: Path) -> None:
    output = find_neighbours(Output(str(tmp_path / "n")), embeddings(tmp_path / "e", clustered(8)), None, WALK)
    assert {len(ids) for ids in output.read_parts(tables.NEIGHBOURS)["neighbour_ids"].to_pylist()} == {7}
    nearest = read_neighbours(output)
    assert ((nearest.rows >= 0).sum(axis=1) == 7).all()
    assert np.isneginf(nearest.cosines[:, 7:]).all()


def test_a_gallery_mined_through_lists_on_disk(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    source = embeddings(tmp_path / "e", clustered(400))
    pairs = {}
    for kind in ("exact", "ondisk"):
        config = WALK.model_copy(update={"index": IndexConfig.model_validate({"kind": kind, "nprobe": 80})})
        output = Output(str(tmp_path / kind))
        mine_pairs(output, source, None, None, config, 0, TaskResources(), monitor)
        assert Output(f"{output.uri}.neighbours").read_json(REPORT)["index"] == kind
        table = output.read_parts(tables.PAIRS)
        pairs[kind] = set(zip(table["reference_id"].to_pylist(), table["target_id"].to_pylist(), strict=True))
    assert pairs["exact"] == pairs["ondisk"]  # all lists are searched, and scores are exact
