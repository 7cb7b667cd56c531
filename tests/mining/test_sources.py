import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from mining.config import GalleryConfig
from mining.sources import BytesReader, list_images


def contents(table: pa.Table) -> dict[str, bytes]:
    reader = BytesReader()
    return {row["key"]: reader.read(row["uri"], row["offset"], row["length"]) for row in table.to_pylist()}


@pytest.fixture
def expected(photos: list[tuple[str, bytes]]) -> dict[str, bytes]:
    return dict(photos[:24])


def test_folder(photo_folder: Path, expected: dict[str, bytes]) -> None:
    (photo_folder / "notes.txt").write_text("no image")
    index, rejects = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert contents(index) == expected
    assert index["key"].to_pylist() == sorted(expected)
    assert rejects == []


def test_tar(tmp_path: Path, photo_folder: Path, expected: dict[str, bytes]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in sorted(photo_folder.iterdir()):
            archive.add(path, arcname=path.name)
    index, _ = list_images(GalleryConfig(images=str(tmp_path / "a.tar")), "images")
    assert contents(index) == expected


def test_parquet_of_several_row_groups(tmp_path: Path, expected: dict[str, bytes]) -> None:
    table = pa.table({"key": list(expected), "image": list(expected.values())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    index, _ = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert contents(index) == expected


def test_split_lists_names_or_maps_them_to_paths(tmp_path: Path, photo_folder: Path, expected: dict[str, bytes]) -> None:
    names = sorted(expected)[:3]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([*names, "ghost"]))
    index, rejects = list_images(GalleryConfig(images=str(photo_folder), split=str(listed)), "images")
    assert index["key"].to_pylist() == names
    assert [(row["key"], row["reason"]) for row in rejects] == [("ghost", "missing_image")]
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps({"first": f"./{names[0]}.jpg"}))
    index, _ = list_images(GalleryConfig(images=str(photo_folder), split=str(mapped)), "images")
    assert contents(index) == {"first": expected[names[0]]}


def test_second_use_of_a_name_is_rejected(photo_folder: Path) -> None:
    first = sorted(photo_folder.iterdir())[0]
    first.with_suffix(".png").write_bytes(first.read_bytes())
    index, rejects = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert len(index) == 24
    assert [(row["key"], row["reason"]) for row in rejects] == [(first.stem, "duplicate_name")]


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ingest\.galleries\.a\.images: .* does not exist"):
        list_images(GalleryConfig(images=str(tmp_path / "none")), "ingest.galleries.a.images")
    with pytest.raises(UserError, match="no image found"):
        list_images(GalleryConfig(images=str(tmp_path)), "images")
    with pytest.raises(UserError, match="cannot be read as a JSON list"):
        list_images(GalleryConfig(images=str(tmp_path), split=str(tmp_path / "none.json")), "images")
