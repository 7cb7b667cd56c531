from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts import Output
from cluster.config import ActorResources, EmbedResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.stage import run_together
from mining import tables
from mining.config import GalleryConfig, IngestConfig, TowerConfig, ViewsConfig
from mining.embed import Embed, Embedder
from mining.embeddings import plain_parts, read_part
from mining.features import Features, Online
from mining.gallery import keys
from tests.chaos.killing import assert_same_embeddings, killing
from tests.conftest import Recorder
from tests.mining.stages import embed_gallery, ingest_gallery
from tests.stages import given

RESOURCES = EmbedResources(actors=1, cpus=1, decode_cpus=0.5, decode_tasks=2, batch_size=4)
VIEWS = ViewsConfig(count=3)


def ingest(photos: Path, folder: Path, monitor: Monitor, copy_images: bool = True, shard_rows: int = 10) -> Output:
    output = Output(str(folder))
    options = IngestConfig(galleries={}, triplets={}, shard_rows=shard_rows)
    ingest_gallery(output, "g", GalleryConfig(images=str(photos), copy_images=copy_images), options, RESOURCES, monitor)
    return output


@pytest.fixture
def gallery(ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor) -> Output:
    return ingest(photo_folder, tmp_path / "gallery", monitor)


def embed(gallery: Output, tower: TowerConfig, folder: Path, monitor: Monitor, views: ViewsConfig = VIEWS) -> Output:
    output = Output(str(folder))
    embed_gallery(output, gallery, tower, views, RESOURCES, monitor)
    return output


def plain(output: Output) -> tuple[np.ndarray, np.ndarray]:
    parts = [read_part(output, name) for name in plain_parts(output)]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([values for _, values in parts]).astype(np.float32)


def test_every_view_of_every_image_once(gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor) -> None:
    output = embed(gallery, tower, tmp_path / "e", monitor)
    assert len(output.parts()) == 9
    ids, _ = plain(output)
    assert sorted(ids) == sorted(keys(gallery).values())
    first, augmented = (read_part(output, f"part-00000.v{view}.parquet")[1] for view in (0, 1))
    assert not np.allclose(first, augmented)
    assert monitor.advanced == 24 + 3 * 24


def test_actors_that_decode_for_themselves_make_the_same(
    gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    fed, alone = embed(gallery, tower, tmp_path / "fed", monitor), Output(str(tmp_path / "alone"))
    resources = RESOURCES.model_copy(update={"decode_tasks": 0})
    embed_gallery(alone, gallery, tower, VIEWS, resources, monitor)
    assert resources.processes() == ActorResources(cpus=1).processes()
    names = fed.parts()
    assert fed.hashes(names) == alone.hashes(names)


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


def test_a_killed_actor_is_replaced_and_the_parts_are_the_same(
    ray_session: None, photo_folder: Path, tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    gallery = ingest(photo_folder, tmp_path / "gallery", monitor, shard_rows=2)
    whole, broken = embed(gallery, tower, tmp_path / "whole", monitor, ViewsConfig()), Output(str(tmp_path / "broken"))
    with killing("Embedder", lambda: len(broken.parts()) > 2):
        embed(gallery, tower, tmp_path / "broken", monitor, ViewsConfig())
    assert_same_embeddings(broken, whole)


def test_cached_and_online_features_are_the_same(gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor) -> None:
    output = embed(gallery, tower, tmp_path / "e", monitor)
    ids = np.array(sorted(keys(gallery).values()))[:8]
    views = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    cached = Features(output).open(ids).take(ids, views)
    online = Features(output, Online((gallery,), tower, VIEWS)).open(ids).take(ids, views)
    assert cached.shape == (8, 1, cached.shape[-1])
    assert np.allclose(cached, online, rtol=1e-2, atol=2e-3)


def test_a_shard_of_bad_images_alone_gives_an_empty_part(
    ray_session: None, photo_folder: Path, tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    for path in sorted(photo_folder.iterdir())[:10]:
        path.write_bytes(b"no image")
    gallery = ingest(photo_folder, tmp_path / "gallery", monitor)
    output = embed(gallery, tower, tmp_path / "e", monitor, ViewsConfig())
    assert list(output.part_rows().values()) == [0, 10, 4]
    assert not len(output.rejects())


def test_images_that_vanish_after_ingest_are_counted_rejects(
    ray_session: None, photo_folder: Path, tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    gallery = ingest(photo_folder, tmp_path / "gallery", monitor, copy_images=False)
    paths = sorted(photo_folder.iterdir())
    paths[0].unlink()
    paths[11].write_bytes(paths[11].read_bytes()[:500])
    for path in paths[20:]:
        path.unlink()
    monitor.advanced = 0
    output = embed(gallery, tower, tmp_path / "e", monitor, ViewsConfig(count=2))
    assert list(output.part_rows().values()) == [9, 9, 9, 9, 0, 0]
    assert monitor.advanced == 2 * 24
    rejects = output.rejects()
    assert sorted(rejects["key"].to_pylist()) == sorted(2 * [path.stem for path in (paths[0], paths[11], *paths[20:])])
    assert str(keys(gallery)[paths[0].stem]) in rejects["detail"][0].as_py()


def test_a_gallery_without_a_readable_image_is_an_error(
    ray_session: None, photo_folder: Path, tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    gallery = ingest(photo_folder, tmp_path / "gallery", monitor, copy_images=False)
    for path in photo_folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no image of the gallery can be read any more"):
        embed(gallery, tower, tmp_path / "e", monitor, ViewsConfig())


def test_galleries_of_one_tower_are_embedded_in_one_execution(
    ray_session: None, photo_folder: Path, photos: list[tuple[str, bytes]], tower: TowerConfig, tmp_path: Path, monitor: Monitor
) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for key, content in photos[30:40]:
        (more / f"{key}.jpg").write_bytes(content)
    galleries = [ingest(photo_folder, tmp_path / "first", monitor), ingest(more, tmp_path / "second", monitor)]
    stages = [
        Embed(name=f"t.{i}", gallery=given(gallery), tower=tower, views=ViewsConfig(count=1 + i), resources=RESOURCES)
        for i, gallery in enumerate(galleries)
    ]
    assert stages[0].joins(stages[1])
    assert not stages[0].joins(replace(stages[1], tower=tower.model_copy(update={"output": "tokens"})))
    monitors = {stage: Recorder() for stage in stages}
    found = run_together(monitors, str(tmp_path / "root"))  # type: ignore[arg-type]
    assert [(one.total, one.advanced) for one in monitors.values()] == [(24, 24), (20, 20)]
    seconds = [manifest["startup_seconds"] for manifest in found.values() if not isinstance(manifest, UserError)]
    assert seconds[0] > seconds[1]
    for stage, gallery in zip(stages, galleries, strict=True):
        alone = embed(gallery, tower, tmp_path / f"alone{stage.name}", monitor, stage.views)
        together = stage.output(str(tmp_path / "root"))
        assert together.parts() == alone.parts()
        for part in alone.parts():
            assert all(np.array_equal(*pair) for pair in zip(read_part(together, part), read_part(alone, part), strict=True))


def test_tokens_are_kept_apart(gallery: Output, tower: TowerConfig, tmp_path: Path, monitor: Monitor) -> None:
    tokens = tower.model_copy(update={"output": "tokens"})
    output = embed(gallery, tokens, tmp_path / "e", monitor, ViewsConfig())
    _, values = plain(output)
    assert values.shape[:2] == (24, 4)


def test_a_value_that_is_not_finite_rejects_its_image(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    actor = object.__new__(Embedder)
    actor.decode = None
    values = np.ones((3, 1, 4), np.float16)
    values[1, 0, 2], values[2] = np.nan, 1
    actor.outputs, actor._embed = [output], lambda pixels: values  # type: ignore[method-assign]
    part = {"output": np.zeros(1, int), "part": np.array(["part-00000.v0.parquet"])}
    row = {**part, "rows": np.array([3]), "image_id": np.array([[5, 6, 7]])}
    none = np.zeros((1, 3), np.uint8)
    actor({**row, "pixels": np.zeros((1, 3, 2, 2, 3), np.uint8), "reused": none, "earlier": np.array([""])})
    table = output.read_table("part-00000.v0.parquet", tables.embeddings(1, 4))
    assert table["image_id"].to_pylist() == [5, 7]
    assert [(row["key"], row["reason"]) for row in output.rejects().to_pylist()] == [("6", "not_finite")]
