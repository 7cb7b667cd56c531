import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cluster.artifacts import Output
from cluster.errors import UserError
from mining.config import TowerConfig, ViewsConfig
from mining.embed import _schema, _to_table
from mining.embeddings import INFO, MEAN
from mining.features import Online, centred, unit_vectors
from mining.scratch import UNUSED_SECONDS
from tests.stages import centred_by_own

IMAGES, VIEWS, TOKENS, DIM = 12, 3, 2, 8
VALUES = np.random.default_rng(0).normal(size=(IMAGES, VIEWS, TOKENS, DIM)).astype(np.float16)
IDS = np.arange(IMAGES) * 10


@pytest.fixture(autouse=True)
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of joined files of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"vdg-shared-{os.getuid()}"


@pytest.fixture
def embeddings(tmp_path: Path) -> Output:
    """Two parts a view."""
    output = Output(str(tmp_path / "embeddings"))
    for view in range(VIEWS):
        for part, rows in enumerate(np.array_split(np.arange(IMAGES), 2)):
            values = VALUES[rows, view]
            output.write_table(f"part-0000{part}.v{view}.parquet", _to_table(IDS[rows], view, values), _schema(values))
    output.write_json(INFO, {"tokens": TOKENS, "dim": DIM, "views": VIEWS})
    output.write_bytes(MEAN, save({"mean": VALUES[:, 0].astype(np.float32).mean(axis=(0, 1))}))
    return output


def test_every_view_is_joined_once_for_all_who_open_it(embeddings: Output, joined: Path) -> None:
    first, second = (centred_by_own(embeddings).open(IDS[[5, 1, 5]]) for _ in range(2))
    views = np.array([2, 0])
    for source in (first, second):
        assert np.array_equal(source.take(IDS[[5, 1]], views), VALUES[[5, 1], views].astype(np.float32))
    assert [np.load(path).shape for path in joined.glob("*.npy")] == [(2, VIEWS, TOKENS, DIM)]
    assert set(first.draw_views(100, np.random.default_rng(0)).tolist()) == {0, 1, 2}


def test_the_plain_view_is_joined_alone_even_where_the_tower_runs_online(embeddings: Output, joined: Path) -> None:
    online = Online((), TowerConfig(library="timm", model="unused"), ViewsConfig(online=True))
    source = centred_by_own(embeddings, online).open_plain(IDS[:4])
    assert np.array_equal(source.take(IDS[1:3], np.zeros(2, int)), VALUES[1:3, 0].astype(np.float32))
    assert [np.load(path).shape for path in joined.glob("*.npy")] == [(4, 1, TOKENS, DIM)]


def test_embeddings_made_again_in_the_same_place_are_joined_again(embeddings: Output) -> None:
    centred_by_own(embeddings).open_plain(IDS)
    for part, rows in enumerate(np.array_split(np.arange(IMAGES), 2)):
        values = -VALUES[rows, 0]
        embeddings.write_table(f"part-0000{part}.v0.parquet", _to_table(IDS[rows], 0, values), _schema(values))
    embeddings.write_bytes(MEAN, save({"mean": -VALUES[:, 0].astype(np.float32).mean(axis=(0, 1))}))
    assert np.array_equal(centred_by_own(embeddings).open_plain(IDS).take(IDS, np.zeros(IMAGES, int)), -VALUES[:, 0])


def test_features_know_only_the_images_they_were_opened_with(embeddings: Output) -> None:
    with pytest.raises(KeyError, match="was not opened"):
        centred_by_own(embeddings).open(IDS[:4]).take(IDS[4:5], np.zeros(1, int))


def test_images_without_embeddings_are_named(embeddings: Output) -> None:
    features = centred_by_own(embeddings)
    features.check(IDS, "train.triplets")
    with pytest.raises(
        UserError, match=r"train\.triplets: 2 image\(s\) have no embeddings in .*, such as image_id 1: .*rejects"
    ):
        features.check(np.array([0, 3, 1, 10]), "train.triplets")
    with pytest.raises(UserError, match=r"1 image\(s\) have no embeddings"):
        features.open(np.array([0, 1]))


def test_joined_files_that_nobody_opened_for_a_day_are_removed(embeddings: Output, joined: Path) -> None:
    mapped, _ = (centred_by_own(embeddings).open(ids) for ids in (IDS[:3], IDS[:4]))
    for path in joined.glob("*.npy"):
        os.utime(path, (0, path.stat().st_mtime - UNUSED_SECONDS - 1))
    centred_by_own(embeddings).open(IDS[:4])  # used again
    centred_by_own(embeddings).open(IDS[:5])
    assert sorted(np.load(path).shape[0] for path in joined.glob("*.npy")) == [4, 5]
    assert np.array_equal(mapped.take(IDS[:3], np.zeros(3, int)), VALUES[:3, 0])


def test_unit_vectors_average_tokens(embeddings: Output) -> None:
    mean = np.full(DIM, 0.1, np.float32)
    ids, vectors = unit_vectors(embeddings, mean)
    assert np.array_equal(ids, IDS)
    assert np.allclose(vectors, centred(VALUES[:, 0].astype(np.float32).mean(axis=1), mean), atol=1e-5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
