"""Nearest neighbours: exact by FAISS and by products of blocks, and through inverted lists."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mining.block_product import BlockProduct
from mining.config import IndexConfig
from mining.indexes import filled, kind_for
from mining.search import Exact, Lists, Search, neighbours_of, plan
from tests.mining.test_mine import clustered

EXACT: list[Callable[[np.ndarray], Search]] = [Exact, lambda vectors: BlockProduct(vectors, "cpu")]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def opened(vectors: np.ndarray, kind: str, nprobe: int | None = None) -> tuple[dict[str, object], Lists]:
    report, lists = plan(vectors, 5, IndexConfig.model_validate({"kind": kind, "nprobe": nprobe}), seed=0)
    index = filled(lists, vectors, kind == "ondisk")
    index.nprobe = report["nprobe"]
    return report, Lists(vectors, index)


@pytest.mark.parametrize("search", EXACT)
def test_neighbours_agree_with_brute_force(search: Callable[[np.ndarray], Search]) -> None:
    vectors = clustered(300)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -np.inf)
    found, scores = neighbours_of(search(vectors), np.arange(300), 5)
    assert np.allclose(scores, -np.sort(-cosine, axis=1)[:, :5], atol=1e-5)
    assert np.allclose(np.take_along_axis(cosine, found, 1), scores, atol=1e-5)


@pytest.mark.parametrize("noise", [0.35, 0.02])  # of the latter half precision cannot tell a cluster's images apart
def test_shards_and_half_precision_change_nothing(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(3000, dim=32, noise=noise)
    whole = neighbours_of(Exact(vectors), np.arange(3000), 20)
    monkeypatch.setattr("mining.search.SHARD_ROWS", 700)
    monkeypatch.setattr("mining.block_product.SHARD_ROWS", 700)
    monkeypatch.setattr("mining.block_product.QUERIES", 256)
    for search in EXACT:
        found, scores = neighbours_of(search(vectors), np.arange(3000), 20)
        assert np.allclose(scores, whole[1], atol=1e-6)
        differ = found != whole[0]
        assert differ.mean() < (1e-3 if noise > 0.1 else 0.1)  # where two cosines are the same to fp32
        exact = np.einsum("bd,bkd->bk", vectors, vectors[found])
        assert np.allclose(exact, scores, atol=1e-6)
        assert not (found == np.arange(3000)[:, None]).any()


@pytest.mark.parametrize("kind", ["ivf", "ondisk"])
def test_approximate_neighbours_have_exact_scores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mining.indexes.SHARD_ROWS", 800)
    vectors = clustered(3000)
    report, search = opened(vectors, kind)
    found, scores = neighbours_of(search, np.arange(3000), 5)
    exact = np.einsum("bd,bkd->bk", vectors, vectors[found.clip(0)])
    assert np.allclose(exact[found >= 0], scores[found >= 0], atol=1e-5)
    best = neighbours_of(Exact(vectors), np.arange(3000), 5)[0]
    hits = [len(set(f) & set(b)) / 5 for f, b in zip(found.tolist(), best.tolist(), strict=True)]
    assert np.mean(hits) > 0.9
    assert report["index"] == kind
    assert report["recall"] == pytest.approx(np.mean(hits), abs=0.03)


def test_lists_on_disk_find_what_lists_in_memory_do_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mining.indexes.SHARD_ROWS", 800)
    np.save(tmp_path / "vectors.npy", clustered(3000))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    in_memory, *on_disk = (opened(mapped, kind, nprobe=4)[1] for kind in ("ivf", "ondisk", "ondisk"))
    rows = np.arange(0, 3000, 7)
    for search in on_disk:
        assert all(
            np.array_equal(*both)
            for both in zip(neighbours_of(in_memory, rows, 5), neighbours_of(search, rows, 5), strict=True)
        )
    folders = [sorted(path.name for path in folder.iterdir()) for folder in tmp_path.glob("*/*.lists")]
    assert sorted(folders) == [["index"], ["index", "lists"]]


def test_no_more_lists_are_searched_than_the_recall_needs() -> None:
    vectors = clustered(20_000, clusters=400, dim=32)
    configs = (IndexConfig(kind="ivf", nlist=1024, recall=wanted) for wanted in (0.3, 1.0))
    few, many = (plan(vectors, 10, config, seed=0)[0] for config in configs)
    assert (few["nprobe"], many["nprobe"]) == (4, 32)
    assert few["recall"] <= many["recall"]


def test_auto_takes_the_index_of_the_size() -> None:
    kinds = [kind_for(IndexConfig(), rows) for rows in (6, 200_000, 200_001, 1_000_000, 1_000_001)]
    assert kinds == ["exact", "exact", "ivf", "ivf", "ondisk"]


@pytest.mark.parametrize("search", EXACT)
def test_exact_copies_do_not_hide_an_image_from_its_neighbours(search: Callable[[np.ndarray], Search]) -> None:
    vectors = np.repeat(clustered(4), 8, axis=0)
    assert not (neighbours_of(search(vectors), np.arange(32), 3)[0] == np.arange(32)[:, None]).any()
