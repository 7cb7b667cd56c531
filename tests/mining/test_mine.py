import hashlib
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cluster.artifacts import Output
from cluster.config import TaskResources
from cluster.errors import UserError
from mining import tables
from mining.config import MatchedConfig, MineConfig, RandomConfig, WalkConfig
from mining.embed import _schema, _to_table
from mining.embeddings import INFO, MEAN
from mining.features import centred
from mining.neighbours import Nearest
from mining.pairs.matched import Matcher
from mining.pairs.random import random_pairs
from mining.pairs.similarities import SIMILARITIES
from mining.pairs.walk import PAIR_RANKS, groups_of, shuffled, without_overlap
from mining.search import Exact, neighbours_of
from tests.conftest import Recorder
from tests.mining.stages import mine_pairs

WALK = MineConfig(gallery="g", tower="t")
MATCHED = MineConfig(gallery="g", tower="t", method="matched", triplets="t", matched=MatchedConfig(pairs=300), part_rows=100)
GROUPS = MATCHED.model_copy(update={"method": "matched_groups"})


def clustered(rows: int, clusters: int = 40, dim: int = 16, noise: float = 0.35) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(clusters, dim))
    values = centres[rng.integers(clusters, size=rows)] + noise * rng.normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def embeddings(folder: Path, values: np.ndarray, first: int = 1000) -> Output:
    output = Output(str(folder))
    ids = first + np.arange(len(values)) * 1000
    tokens = values.astype(np.float16)[:, None]
    output.write_table("part-00000.v0.parquet", _to_table(ids, 0, tokens), _schema(tokens))
    output.write_json(INFO, {"tokens": 1, "dim": values.shape[1], "views": 1})
    output.write_bytes(MEAN, save({"mean": values.mean(axis=0).astype(np.float32)}))
    return output


def nearest(vectors: np.ndarray, top: int) -> Nearest:
    return Nearest(np.arange(len(vectors)), *neighbours_of(Exact(vectors), np.arange(len(vectors)), top))


def walk_all(vectors: np.ndarray, config: WalkConfig) -> list[tuple[int, ...]]:
    groups = groups_of(nearest(vectors, config.top), slice(0, len(vectors)), config)
    kept = without_overlap(shuffled(groups, len(vectors), seed=0), len(vectors), config)
    return [tuple(group) for group in kept.tolist()]


def test_walk_keeps_the_papers_rules() -> None:
    vectors = clustered(800)
    groups = walk_all(vectors, WalkConfig())
    assert len(groups) > 20
    for group in groups:
        scores = [float(vectors[group[0]] @ vectors[row]) for row in group[1:]]
        assert len(set(group)) == 6
        assert max(scores) <= 0.94 + 1e-6
        assert all(first - second >= 0.002 - 1e-6 for first, second in pairwise(scores))
    assert max(len(set(a) & set(b)) for a, b in combinations(groups, 2)) <= 2


def test_a_cap_of_slots_bounds_the_groups_of_an_image() -> None:
    vectors = clustered(800)
    free, capped = (walk_all(vectors, WalkConfig(max_slots=slots)) for slots in (32, 2))
    assert np.bincount(np.ravel(free)).max() > 2
    assert np.bincount(np.ravel(capped)).max() == 2
    assert max(len(set(a) & set(b)) for a, b in combinations(capped, 2)) <= 2
    assert capped[0] == free[0]  # first come first kept
    assert len(capped) > len(free) / 4


def test_walk_skips_a_neighbour_that_is_too_close_to_the_last() -> None:
    angles = np.arccos([1.0, 0.9, 0.8995, 0.85, 0.8, 0.75, 0.7])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    config = WalkConfig(top=6)
    anchored = [group for group in walk_all(vectors, config) if group[0] == 0]
    assert all(group == (0, 1, 3, 4, 5, 6) for group in anchored)


def test_matched_pairs_have_the_labelled_histogram() -> None:
    vectors = centred(clustered(1500), np.zeros(1, np.float32))
    labelled = np.random.default_rng(1).normal(0.3, 0.1, 5000).clip(-1, 1)
    matcher = Matcher(vectors, nearest(vectors, 20), labelled, MatchedConfig(pairs=4000, bins=20), seed=0)
    shards = np.array_split(np.random.default_rng(0).permutation(1500), 4)
    blocks = [matcher.draw(anchors, np.random.default_rng(i)) for i, anchors in enumerate(shards)]
    assert all(set(block[0]) <= set(shard) for block, shard in zip(blocks, shards, strict=True))
    scores = np.concatenate([block[2] for block in blocks])
    assert len(scores) == pytest.approx(4000, rel=0.1)
    edges = np.linspace(-1, 1, 21)
    drawn, wanted = (np.histogram(values, edges)[0] / len(values) for values in (scores, labelled))
    assert np.abs(drawn - wanted).sum() < 0.1
    references, targets = (np.concatenate([block[side] for block in blocks]) for side in (0, 1))
    assert (references != targets).all()
    assert np.allclose(np.einsum("nd,nd->n", vectors[references], vectors[targets]), scores, atol=1e-5)


def test_matched_targets_come_from_the_whole_gallery() -> None:
    found = {}
    for images in (3000, 12_000):
        vectors = clustered(images, clusters=images // 20)
        labelled = np.random.default_rng(1).normal(0.1, 0.2, 5000).clip(-1, 1)
        config = MatchedConfig(pairs=images, sample=256)
        matcher = Matcher(vectors, nearest(vectors, 20), labelled, config, seed=0)
        found[images] = matcher.draw(np.random.default_rng(0).permutation(images), np.random.default_rng(0))[1]
    assert len(np.unique(found[12_000])) > 3.5 * len(np.unique(found[3000]))
    most_of_256 = np.sort(np.bincount(found[12_000]))[-256:].sum()  # no 256 images, whichever they are, have more targets
    assert most_of_256 < 0.2 * len(found[12_000])


def test_mined_tables(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    source = embeddings(tmp_path / "e", clustered(400))
    output = Output(str(tmp_path / "walk"))
    mine_pairs(output, source, None, None, WALK, 0, TaskResources(), monitor)
    table = output.read_parts(tables.PAIRS)
    pairs = list(zip(table["reference_id"].to_pylist(), table["target_id"].to_pylist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    ranks = set(zip(table["reference_rank"].to_pylist(), table["target_rank"].to_pylist(), strict=True))
    assert ranks == set(PAIR_RANKS)
    again = Output(str(tmp_path / "again"))
    monitor.advanced = 0
    mine_pairs(again, source, None, None, WALK, 0, TaskResources(), monitor)
    assert again.read_parts(tables.PAIRS).equals(table)
    assert monitor.advanced == 400


def labelled_pairs(folder: Path) -> Output:
    labelled = Output(str(folder))
    ids = np.arange(1, 401) * 1000
    rng = np.random.default_rng(0)
    rows = [
        {"triplet_id": i, "reference_id": int(r), "target_id": int(t), "deltas": ["x"], "source": "human"}
        for i, (r, t) in enumerate(rng.choice(ids, (200, 2)))
    ]
    labelled.write_table("part-00000.parquet", tables.pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    return labelled


def test_the_walk_finds_what_it_found_when_it_searched_itself(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    """The digest is of the pairs of version 3 of the stage."""
    source, output = embeddings(tmp_path / "e", clustered(5000, clusters=100)), Output(str(tmp_path / "m"))
    mine_pairs(output, source, None, None, WALK, 0, TaskResources(), monitor)
    table = output.read_parts(tables.PAIRS)
    ids = np.stack([table[name].to_numpy() for name in ("pair_id", "reference_id", "target_id")])
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == "f3dbd1d0296ceed2"


def test_matched_table_imitates_labelled_triplets(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    source, labelled = embeddings(tmp_path / "e", clustered(400)), labelled_pairs(tmp_path / "t")
    output = Output(str(tmp_path / "m"))
    mine_pairs(output, source, labelled, None, MATCHED, 0, TaskResources(), monitor)
    rows = output.part_rows()
    assert sum(rows.values()) == pytest.approx(300, rel=0.25)
    assert [count == pytest.approx(100, rel=0.4) for count in rows.values()] == [True] * 3
    assert monitor.advanced == 400
    densities = output.read_json(SIMILARITIES)
    assert np.abs(np.subtract(densities["mined"], densities["labelled"])).mean() < 0.15
    assert output.read_parts(tables.PAIRS)["group_id"].null_count == sum(output.part_rows().values())


def test_a_killed_match_goes_on_from_its_parts(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    source, labelled = embeddings(tmp_path / "e", clustered(400)), labelled_pairs(tmp_path / "t")
    output = Output(str(tmp_path / "m"))
    mine_pairs(output, source, labelled, None, MATCHED, 0, TaskResources(), monitor)
    before, histograms = output.read_parts(tables.PAIRS), output.read_json(SIMILARITIES)
    for name in (SIMILARITIES, "part-00001.parquet"):
        (tmp_path / "m" / name).unlink()
    kept = (tmp_path / "m" / "part-00000.parquet").stat().st_mtime_ns
    monitor.advanced = 0
    mine_pairs(output, source, labelled, None, MATCHED, 0, TaskResources(), monitor)
    assert (monitor.total, monitor.resumed, monitor.advanced) == (400, 267, 133)
    assert (tmp_path / "m" / "part-00000.parquet").stat().st_mtime_ns == kept
    assert output.read_parts(tables.PAIRS).equals(before)
    assert output.read_json(SIMILARITIES) == histograms


def test_labelled_pairs_of_another_gallery_are_refused(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    labelled = labelled_pairs(tmp_path / "t")
    elsewhere = embeddings(tmp_path / "other", clustered(400), first=1)
    with pytest.raises(UserError, match=r"mine\.triplets: no labelled pair of 't' has both images in gallery 'g'"):
        mine_pairs(Output(str(tmp_path / "m")), elsewhere, labelled, None, MATCHED, 0, TaskResources(), monitor)


def test_a_gallery_smaller_than_a_group_is_refused(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    source = embeddings(tmp_path / "e", clustered(5))
    with pytest.raises(UserError, match=r"mine.gallery: 'g' has 5 image\(s\), fewer than a group of 6"):
        mine_pairs(Output(str(tmp_path / "m")), source, None, None, WALK, 0, TaskResources(), monitor)


def test_random_pairs_are_distinct_and_uniform() -> None:
    references, targets = random_pairs(30, 600, seed=0)
    assert (references != targets).all()
    assert len(set(zip(references.tolist(), targets.tolist(), strict=True))) == 600
    expected = 600 / 30
    for side in (references, targets):
        assert ((np.bincount(side, minlength=30) - expected) ** 2 / expected).sum() < 60  # chi-squared, 29 degrees
    every = set(zip(*(side.tolist() for side in random_pairs(6, 30, seed=0)), strict=True))
    assert every == {(a, b) for a in range(6) for b in range(6) if a != b}
    with pytest.raises(UserError, match=r"mine.random.pairs: asked for 31, but 6 images have 30 ordered pairs"):
        random_pairs(6, 31, seed=0)


def test_random_table_goes_on_to_the_same(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    values = clustered(400)
    source, output = embeddings(tmp_path / "e", values), Output(str(tmp_path / "m"))
    config = MineConfig(gallery="g", tower="t", method="random", random=RandomConfig(pairs=250), part_rows=100)
    mine_pairs(output, source, None, None, config, 0, TaskResources(), monitor)
    assert list(output.part_rows().values()) == [100, 100, 50]
    assert monitor.advanced == 400
    table = output.read_parts(tables.PAIRS)
    assert table["group_id"].null_count == table["reference_rank"].null_count == 250
    rows = [table[name].to_numpy() // 1000 - 1 for name in ("reference_id", "target_id")]
    assert np.allclose(table["similarity"], np.einsum("nd,nd->n", values[rows[0]], values[rows[1]]), atol=2e-3)
    (tmp_path / "m" / "part-00001.parquet").unlink()
    mine_pairs(output, source, None, None, config, 0, TaskResources(), monitor)
    assert output.read_parts(tables.PAIRS).equals(table)


def test_matched_groups_are_more_like_the_labelled_pairs_than_the_walks(
    ray_session: None, tmp_path: Path, monitor: Recorder
) -> None:
    source, labelled = embeddings(tmp_path / "e", clustered(400)), labelled_pairs(tmp_path / "t")
    distances = {}
    for config in (WALK, GROUPS):
        output = Output(str(tmp_path / config.method))
        mine_pairs(output, source, labelled, None, config, 0, TaskResources(), monitor)
        densities = output.read_json(SIMILARITIES)
        distances[config.method] = np.abs(np.subtract(densities["mined"], densities["labelled"])).sum() / 40  # half of 2/40
    assert distances["walk"] > 0.8
    assert distances["matched_groups"] < 0.1


def test_matched_groups_have_whole_groups(ray_session: None, tmp_path: Path, monitor: Recorder) -> None:
    source, labelled = embeddings(tmp_path / "e", clustered(400)), labelled_pairs(tmp_path / "t")
    output = Output(str(tmp_path / "m"))
    mine_pairs(output, source, labelled, None, GROUPS, 0, TaskResources(), monitor)
    assert monitor.advanced == 400
    table = output.read_parts(tables.PAIRS)
    assert len(table) == pytest.approx(300, rel=0.15)
    rows = table.to_pylist()
    assert len({(row["reference_id"], row["target_id"]) for row in rows}) == len(rows)
    assert {(row["reference_rank"], row["target_rank"]) for row in rows} <= set(PAIR_RANKS)
    for group in {row["group_id"] for row in rows}:
        pairs = [row for row in rows if row["group_id"] == group]
        assert len(pairs) >= 2
        by_rank = {(row[f"{side}_rank"], row[f"{side}_id"]) for row in pairs for side in ("reference", "target")}
        assert len({rank for rank, _ in by_rank}) == len({image for _, image in by_rank}) == len(by_rank)  # one image a rank
        scores = [row["similarity"] for row in sorted(pairs, key=lambda row: row["target_rank"]) if row["reference_rank"] == 0]
        assert scores == sorted(scores, reverse=True)
    for name in output.parts()[1:]:
        (tmp_path / "m" / name).unlink()
    mine_pairs(output, source, labelled, None, GROUPS, 0, TaskResources(), monitor)
    assert output.read_parts(tables.PAIRS).equals(table)


def test_matched_groups_need_labels() -> None:
    with pytest.raises(ValueError, match="method 'matched_groups' needs 'triplets'"):
        MineConfig(gallery="g", tower="t", method="matched_groups")
