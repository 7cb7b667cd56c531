from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.weights import Weights
from mining.config import EmbedConfig, GalleryConfig, IngestConfig, TowerConfig, ViewsConfig
from mining.embed import embed_gallery, read_part
from mining.features import Features, Online, plain_embeddings, read_mean
from mining.gallery import ingest_gallery, keys

RESOURCES = ActorResources(actors=1, cpus=1, decode_cpus=0.5, decode_tasks=2)
VIEWS = ViewsConfig(count=3)


@pytest.fixture
def gallery(ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor) -> Output:
    output = Output(str(tmp_path / "gallery"))
    options = IngestConfig(galleries={}, triplets={}, shard_rows=10)
    ingest_gallery(output, "g", GalleryConfig(images=str(photo_folder)), options, RESOURCES, monitor)
    return output


def embed(gallery: Output, tower: TowerConfig, folder: Path, monitor: Monitor, views: ViewsConfig = VIEWS) -> Output:
    output = Output(str(folder))
    embed_gallery(output, gallery, "t", EmbedConfig(towers={"t": tower}, batch_size=4), views, RESOURCES, monitor)
    return output


def test_every_view_of_every_image_once(gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor) -> None:
    output = embed(gallery, tower, tmp_path / "e", monitor)
    assert len(output.parts()) == 9
    ids, values = plain_embeddings(output)
    assert sorted(ids) == sorted(keys(gallery).values())
    assert np.allclose(read_mean(output), values.mean(axis=(0, 1)), atol=1e-4)
    plain, augmented = (read_part(output, f"part-00000.v{view}.parquet")[1] for view in (0, 1))
    assert not np.allclose(plain, augmented)
    assert monitor.advanced == 24 + 3 * 24


def test_resume_makes_only_what_is_missing_and_makes_it_alike(
    gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    output = embed(gallery, tower, tmp_path / "e", monitor)
    before = {name: read_part(output, name)[1] for name in output.parts()}
    (tmp_path / "e" / "part-00001.v2.parquet").unlink()
    monitor.advanced = 0
    embed(gallery, tower, tmp_path / "e", monitor)
    assert monitor.advanced == 10
    assert all(np.array_equal(read_part(output, name)[1], values) for name, values in before.items())


def test_cached_and_online_features_are_the_same(gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor) -> None:
    output = embed(gallery, tower, tmp_path / "e", monitor)
    ids = np.array(sorted(keys(gallery).values()))[:8]
    views = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    cached = Features(output).open(ids).take(ids, views)
    online = Features(output, Online((gallery,), tower, VIEWS)).open(ids).take(ids, views)
    assert cached.shape == (8, 1, cached.shape[-1])
    assert np.allclose(cached, online, rtol=1e-2, atol=2e-3)


def test_features_know_only_the_images_they_were_opened_with(
    gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    output = embed(gallery, tower, tmp_path / "e", monitor)
    ids = np.array(sorted(keys(gallery).values()))
    features = Features(output).open(ids[:4])
    with pytest.raises(KeyError, match="was not opened"):
        features.take(ids[4:5], np.zeros(1, int))
    with pytest.raises(KeyError, match="no embeddings"):
        Features(output).open(np.array([1]))


def test_missing_weights_are_named_before_an_actor_starts(gallery: Output, tmp_path: Path, monitor: Monitor) -> None:
    tower = TowerConfig(library="timm", model="test_efficientnet", weights=Weights(folder=str(tmp_path), file="none.pth"))
    with pytest.raises(UserError, match=r"none\.pth does not exist"):
        embed(gallery, tower, tmp_path / "e", monitor)


def test_tokens_are_kept_apart(gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor) -> None:
    tokens = tower.model_copy(update={"output": "tokens"})
    output = embed(gallery, tokens, tmp_path / "e", monitor, ViewsConfig())
    _, values = plain_embeddings(output)
    assert values.shape[:2] == (24, 4)
    assert read_mean(output).shape == values.shape[2:]
