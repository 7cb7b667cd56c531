"""A benchmark's val and test images are not mined, by name, prefix, content or looks."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.artifacts import REJECTS, Output
from cluster.config import TaskResources
from cluster.errors import UserError
from mining import tables
from mining.config import MineConfig
from mining.embeddings import plain_parts
from mining.exclude import LISTING, Excluded, Guards, Reject
from tests.conftest import Recorder
from tests.mining.stages import Guard, mine_pairs
from tests.mining.test_mine import clustered, embeddings

IMAGES = 200
WALK = MineConfig(gallery="g", tower="t")


def gallery(output: Output, ids: list[int], keys: list[str]) -> Output:
    """A gallery table whose hashes are the keys' ends."""
    rows = [
        {"image_id": image_id, "key": key, "sha256": f"hash of {key.rpartition('/')[2]}"}
        for image_id, key in zip(ids, keys, strict=True)
    ]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    return output


@pytest.fixture
def mined(tmp_path: Path) -> tuple[Output, Output, np.ndarray]:
    """A gallery, its embeddings and their vectors; the images are `train/4/image-4-img0` and the like."""
    vectors = clustered(IMAGES)
    ids = [1000 * (i + 1) for i in range(IMAGES)]
    images = gallery(Output(str(tmp_path / "g")), ids, [f"train/{i}/image-{i}-img0" for i in range(IMAGES)])
    return images, embeddings(tmp_path / "e", vectors), vectors


def benchmark(folder: Path, rows: list[tuple[str | None, bool, str | None]], vectors: np.ndarray | None = None) -> Excluded:
    """What a benchmark excludes: listed rows (name, is_prefix, sha256), and images with these vectors."""
    output = Output(str(folder / "excluded"))
    listed = [dict(zip(tables.EXCLUDED.names, row, strict=True)) for row in rows]
    output.write_table(LISTING, pa.Table.from_pylist(listed, tables.EXCLUDED), tables.EXCLUDED)
    if vectors is None:
        return Excluded("cirr", output, None)
    gallery(output, [1000 * (i + 1) for i in range(len(vectors))], [f"dev/dev-{i}" for i in range(len(vectors))])
    return Excluded("cirr", output, embeddings(folder / "excluded-e", vectors))


def find_excluded(guard: Guard, source: Output) -> dict[int, Reject]:
    guards = Guards(guard.gallery, guard.benchmarks, guard.similarity)
    return {image_id: row for part in plain_parts(source) for image_id, row in guards.find(source, part).items()}


def reasons(guard: Guard, source: Output) -> dict[str, str]:
    return {row["key"].rpartition("/")[2]: row["reason"] for row in find_excluded(guard, source).values()}


def test_names_prefixes_and_contents(mined: tuple[Output, Output, np.ndarray], tmp_path: Path) -> None:
    images, source, _ = mined
    rows = [
        ("image-4-img0", False, None),
        ("image-5", False, None),  # a name is whole
        ("image-17", True, None),  # 17 and 170 to 179
        ("elsewhere", False, "hash of image-9-img0"),
    ]
    found = reasons(Guard(images, (benchmark(tmp_path, rows),), 0.94), source)
    assert found.pop("image-4-img0") == "excluded_name"
    assert found.pop("image-9-img0") == "excluded_content"
    assert set(found) == {"image-17-img0", *(f"image-{i}-img0" for i in range(170, 180))}
    assert set(found.values()) == {"excluded_prefix"}


def test_near_duplicates_are_those_above_the_threshold(mined: tuple[Output, Output, np.ndarray], tmp_path: Path) -> None:
    images, source, vectors = mined
    held_out = vectors[[3, 80]] + 0.02
    held_out /= np.linalg.norm(held_out, axis=1, keepdims=True)
    guarded = benchmark(tmp_path, [("x", False, None)], held_out.astype(np.float32))
    cosine = (vectors @ held_out.T).max(axis=1)
    assert 2 < (cosine >= 0.8).sum() < IMAGES
    for threshold in (0.8, 0.94):
        assert np.abs(cosine - threshold).min() > 1e-4  # no image is so near it that half precision decides
        found = reasons(Guard(images, (guarded,), threshold), source)
        assert found == {f"image-{i}-img0": "near_duplicate" for i in np.flatnonzero(cosine >= threshold)}
    [detail] = {row["detail"] for i, row in find_excluded(Guard(images, (guarded,), 0.94), source).items() if i == 4000}
    assert detail == f"cirr: cosine {cosine[3]:.3f} with 'dev/dev-0'"


def test_mined_pairs_have_no_excluded_image(
    ray_session: None, mined: tuple[Output, Output, np.ndarray], tmp_path: Path, monitor: Recorder
) -> None:
    images, source, vectors = mined
    guard = Guard(images, (benchmark(tmp_path, [("image-1", True, None)], vectors[:2]),), 0.94)
    output, free = Output(str(tmp_path / "m")), Output(str(tmp_path / "free"))
    mine_pairs(output, source, None, guard, WALK, 0, TaskResources(), monitor)
    excluded = find_excluded(guard, source)
    assert monitor.total == monitor.advanced == IMAGES - len(excluded)
    mine_pairs(free, source, None, None, WALK, 0, TaskResources(), monitor)
    named = [set(tables.images_of(found.read_parts(tables.PAIRS)).tolist()) for found in (output, free)]
    assert not named[0] & set(excluded)
    assert named[1] & set(excluded)
    rejects = Output(f"{output.uri}.exclude").rejects()
    assert sorted(rejects.to_pylist(), key=str) == sorted(excluded.values(), key=str)
    assert rejects.schema == REJECTS


def test_a_gallery_that_is_excluded_whole_is_refused(
    ray_session: None, mined: tuple[Output, Output, np.ndarray], tmp_path: Path, monitor: Recorder
) -> None:
    images, source, _ = mined
    guard = Guard(images, (benchmark(tmp_path, [("image-", True, None)]),), 0.94)
    with pytest.raises(UserError, match=r"'g' has 0 image\(s\) that no benchmark excludes \(200 are excluded\)"):
        mine_pairs(Output(str(tmp_path / "m")), source, None, guard, WALK, 0, TaskResources(), monitor)
