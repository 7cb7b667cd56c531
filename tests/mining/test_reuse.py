"""Of a grown gallery only what is new is embedded."""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.artifacts import Output
from mining import tables
from mining.config import TowerConfig, ViewsConfig
from mining.embed import Embedder, Look, _decode_part, _summarise
from mining.embeddings import plain_parts, read_part, view_part
from mining.reuse import Earlier, count_reused, open_earlier

PART_ROWS, VIEWS = 4, ViewsConfig(count=2)
Photos = list[tuple[str, bytes]]


def gallery(folder: Path, photos: Photos) -> Output:
    """A gallery table in parts of sorted keys, as ingest writes it."""
    output = Output(str(folder))
    rows = [
        {"image_id": tables.stable_id("g", key), "key": key, "image": content, "sha256": str(hash(content))}
        for key, content in sorted(photos)
    ]
    for part, first in enumerate(range(0, len(rows), PART_ROWS)):
        table = pa.Table.from_pylist(rows[first : first + PART_ROWS], tables.GALLERY)
        output.write_table(f"part-{part:05d}.parquet", table, tables.GALLERY)
    return output


class Counting(Embedder):
    """Counts the images that go through the tower."""

    images = 0

    def _embed(self, pixels: np.ndarray) -> np.ndarray:
        self.images += len(pixels)
        return super()._embed(pixels)


def embed(images: Output, folder: Path, tower: TowerConfig, earlier: Earlier | None = None) -> tuple[Output, int]:
    """The embeddings of both views, and how many images went through the tower for them."""
    output = Output(str(folder))
    look = Look(images, output, tower, VIEWS, earlier)
    embedder = Counting(tower, 4, [output], 1, partial(_decode_part, looks=[look]))
    for part in images.parts():
        for view in range(VIEWS.count):
            embedder({"output": np.zeros(1, int), "part": [view_part(part, view)]})
    _summarise(output, VIEWS)
    return output, embedder.images


def values(output: Output, view: int) -> dict[int, np.ndarray]:
    parts = [read_part(output, name.replace(".v0", f".v{view}")) for name in plain_parts(output)]
    return {image_id: value for ids, rows in parts for image_id, value in zip(ids.tolist(), rows, strict=True)}


@pytest.fixture
def shot(photos: Photos) -> Photos:
    return [(f"{i:03d}", content) for i, (_, content) in enumerate(photos[:12])]


def test_a_grown_gallery_embeds_only_its_new_images(shot: Photos, tower: TowerConfig, tmp_path: Path) -> None:
    old, new = shot[1:11:2], [(key, content) for key, content in shot if key != "003"]
    new.append(("003", shot[0][1]))  # the same name, another picture
    before = gallery(tmp_path / "g1", old)
    first, ran = embed(before, tmp_path / "e-1", tower)
    assert ran == VIEWS.count * len(old)
    after = gallery(tmp_path / "g2", new)
    grown, ran = embed(after, tmp_path / "e-2", tower, open_earlier(first, before))
    alone, _ = embed(after, tmp_path / "e-3", tower)
    assert ran == VIEWS.count * (len(new) - len(old) + 1)
    assert count_reused(grown, plain_parts(grown)) == {"e-1": len(old) - 1}
    assert count_reused(alone, plain_parts(alone)) == {}
    for view in range(VIEWS.count):
        found, expected, taken = values(grown, view), values(alone, view), values(first, view)
        assert list(found) == list(expected)  # in the gallery's order, as every part is
        assert all(np.allclose(found[i], expected[i], rtol=1e-2, atol=2e-5) for i in expected)
        changed = tables.stable_id("g", "003")
        assert all(np.array_equal(found[i], taken[i]) for i in taken if i != changed)
        assert np.abs(found[changed] - taken[changed]).max() > 1e-3


def test_a_gallery_that_lost_images_embeds_nothing(shot: Photos, tower: TowerConfig, tmp_path: Path) -> None:
    before, after = gallery(tmp_path / "g1", shot), gallery(tmp_path / "g2", shot[5:9])
    first, _ = embed(before, tmp_path / "e-1", tower)
    output, ran = embed(after, tmp_path / "e-2", tower, open_earlier(first, before))
    assert ran == VIEWS.count  # a black image a part and view tells the shape
    taken = values(first, 1)
    assert all(np.array_equal(value, taken[image_id]) for image_id, value in values(output, 1).items())
    assert len(values(output, 1)) == 4
