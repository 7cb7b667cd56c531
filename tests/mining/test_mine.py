from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cluster.artifacts import Output
from cluster.config import TaskResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.config import MatchedConfig, MineConfig, WalkConfig
from mining.embed import INFO, MEAN, _schema, _to_table
from mining.features import centred
from mining.matched import match
from mining.mine import mine_pairs
from mining.neighbours import neighbours
from mining.walk import PAIR_RANKS, walk

WALK = MineConfig(gallery="g", tower="t")


def clustered(rows: int, clusters: int = 40, dim: int = 16, noise: float = 0.35) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(clusters, dim))
    values = centres[rng.integers(clusters, size=rows)] + noise * rng.normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def embeddings(folder: Path, values: np.ndarray) -> Output:
    output = Output(str(folder))
    ids = np.arange(1, len(values) + 1) * 1000
    tokens = values.astype(np.float16)[:, None]
    output.write_table("part-00000.v0.parquet", _to_table(ids, 0, tokens), _schema(tokens))
    output.write_json(INFO, {"tokens": 1, "dim": values.shape[1], "views": 1})
    output.write_bytes(MEAN, save({"mean": values.mean(axis=0).astype(np.float32)}))
    return output


def test_neighbours_agree_with_brute_force() -> None:
    vectors = clustered(300)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -np.inf)
    for rows, found, scores in neighbours(vectors, 5):
        expected = -np.sort(-cosine[rows], axis=1)[:, :5]
        assert np.allclose(scores, expected, atol=1e-5)
        assert np.allclose(np.take_along_axis(cosine[rows], found, 1), scores, atol=1e-5)


def test_approximate_neighbours_have_exact_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mining.neighbours.EXACT_ROWS", 1000)
    vectors = clustered(3000)
    hits = []
    for rows, found, scores in neighbours(vectors, 5):
        exact = np.einsum("bd,bkd->bk", vectors[rows], vectors[found.clip(0)])
        assert np.allclose(exact[found >= 0], scores[found >= 0], atol=1e-5)
        cosine = vectors[rows] @ vectors.T
        cosine[np.arange(len(rows)), rows] = -np.inf
        best = np.argsort(-cosine, axis=1)[:, :5]
        hits += [len(set(f) & set(b)) / 5 for f, b in zip(found.tolist(), best.tolist(), strict=True)]
    assert np.mean(hits) > 0.9


def test_exact_copies_do_not_hide_an_image_from_its_neighbours() -> None:
    vectors = np.repeat(clustered(4), 8, axis=0)
    for rows, found, _ in neighbours(vectors, 3):
        assert not (found == rows[:, None]).any()


def test_walk_keeps_the_papers_rules() -> None:
    vectors = clustered(800)
    groups = walk(vectors, WalkConfig(), seed=0)
    assert len(groups) > 20
    for group in groups:
        scores = [float(vectors[group.rows[0]] @ vectors[row]) for row in group.rows[1:]]
        assert len(set(group.rows)) == 6
        assert max(scores) <= 0.94 + 1e-6
        assert all(first - second >= 0.002 - 1e-6 for first, second in pairwise(scores))
    assert max(len(set(a.rows) & set(b.rows)) for a, b in combinations(groups, 2)) <= 2


def test_walk_skips_a_neighbour_that_is_too_close_to_the_last() -> None:
    angles = np.arccos([1.0, 0.9, 0.8995, 0.85, 0.8, 0.75, 0.7])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    config = WalkConfig(top=6)
    anchored = [group for group in walk(vectors, config, 0) if group.rows[0] == 0]
    assert all(group.rows == (0, 1, 3, 4, 5, 6) for group in anchored)


def test_matched_pairs_have_the_labelled_histogram() -> None:
    vectors = centred(clustered(1500), np.zeros(1, np.float32))
    labelled = np.random.default_rng(1).normal(0.3, 0.1, 5000).clip(-1, 1)
    blocks = list(match(vectors, labelled, MatchedConfig(pairs=4000, bins=20), seed=0))
    scores = np.concatenate([block[2] for block in blocks])
    assert len(scores) == pytest.approx(4000, rel=0.1)
    edges = np.linspace(-1, 1, 21)
    drawn, wanted = (np.histogram(values, edges)[0] / len(values) for values in (scores, labelled))
    assert np.abs(drawn - wanted).sum() < 0.1
    references, targets = (np.concatenate([block[side] for block in blocks]) for side in (0, 1))
    assert (references != targets).all()
    assert np.allclose(np.einsum("nd,nd->n", vectors[references], vectors[targets]), scores, atol=1e-5)


def test_mined_tables(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    source = embeddings(tmp_path / "e", clustered(400))
    output = Output(str(tmp_path / "walk"))
    mine_pairs(output, source, None, WALK, 0, TaskResources(), monitor)
    table = output.read_parts(tables.PAIRS)
    pairs = list(zip(table["reference_id"].to_pylist(), table["target_id"].to_pylist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    ranks = set(zip(table["reference_rank"].to_pylist(), table["target_rank"].to_pylist(), strict=True))
    assert ranks == set(PAIR_RANKS)
    again = Output(str(tmp_path / "again"))
    mine_pairs(again, source, None, WALK, 0, TaskResources(), monitor)
    assert again.read_parts(tables.PAIRS).equals(table)


def test_matched_table_imitates_labelled_triplets(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    source = embeddings(tmp_path / "e", clustered(400))
    labelled = Output(str(tmp_path / "t"))
    ids = np.arange(1, 401) * 1000
    rng = np.random.default_rng(0)
    rows = [
        {"triplet_id": i, "reference_id": int(r), "target_id": int(t), "deltas": ["x"], "source": "human"}
        for i, (r, t) in enumerate(rng.choice(ids, (200, 2)))
    ]
    labelled.write_table("part-00000.parquet", tables.pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    config = MineConfig(gallery="g", tower="t", method="matched", triplets="t", matched=MatchedConfig(pairs=300), part_rows=100)
    output = Output(str(tmp_path / "m"))
    mine_pairs(output, source, labelled, config, 0, TaskResources(), monitor)
    assert sum(output.part_rows().values()) == pytest.approx(300, rel=0.25)
    assert len(output.parts()) >= 3
    assert output.read_parts(tables.PAIRS)["group_id"].null_count == sum(output.part_rows().values())


def test_a_gallery_smaller_than_a_group_is_refused(ray_session: None, tmp_path: Path, monitor: Monitor) -> None:
    source = embeddings(tmp_path / "e", clustered(5))
    with pytest.raises(UserError, match=r"mine.gallery: 'g' has 5 image\(s\), fewer than a group of 6"):
        mine_pairs(Output(str(tmp_path / "m")), source, None, WALK, 0, TaskResources(), monitor)
