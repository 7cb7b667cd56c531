import gzip
import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifacts import filesystem
from cluster.errors import UserError
from mining.config import GalleryConfig
from mining.sources import BytesReader, _location, list_images


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


def test_parquet_of_hugging_faces_layout(tmp_path: Path, expected: dict[str, bytes]) -> None:
    images = [{"bytes": content, "path": f"{key}.jpg"} for key, content in expected.items()]
    pq.write_table(pa.table({"key": list(expected), "image": [*images[:-1], None]}), tmp_path / "a.parquet", row_group_size=7)
    index, _ = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert contents(index) == {**expected, list(expected)[-1]: b""}


def broken_tar(photo_folder: Path, spoil: Callable[[bytes], bytes]) -> bytes:
    """A tar of the photos, spoiled."""
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(photo_folder.iterdir()):
            archive.add(path, arcname=f"tar/{path.name}")
    return spoil(stream.getvalue())


@pytest.mark.parametrize(
    ("name", "spoil", "some_kept"),
    [
        ("text.tar", lambda content: b"no tar" * 200, False),
        ("packed.tar", gzip.compress, False),
        ("cut.tar", lambda content: content[: len(content) // 2], True),
        ("header.tar", lambda content: content.replace(b"tar/", b"???/", 6).replace(b"???/", b"tar/", 5), True),
        ("empty.parquet", lambda content: b"", False),
        ("text.parquet", lambda content: b"no Parquet file", False),
    ],
)
def test_a_broken_file_is_rejected_alone(
    photo_folder: Path, expected: dict[str, bytes], name: str, spoil: Callable[[bytes], bytes], some_kept: bool
) -> None:
    content = broken_tar(photo_folder, spoil)
    (photo_folder / name).write_bytes(content)
    index, rejects = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert [(row["key"], row["reason"]) for row in rejects] == [(name, "unreadable")]
    kept = [key for key in index["key"].to_pylist() if key.startswith("tar/")]
    assert bool(kept) == some_kept
    assert len(index) == len(expected) + len(kept) < 2 * len(expected)


def test_a_broken_page_is_rejected_with_its_file(tmp_path: Path, photo_folder: Path) -> None:
    path = photo_folder / "a.parquet"
    pq.write_table(pa.table({"key": ["row"], "image": [b"bytes"]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes([255]) * 40 + content[44:])
    index, rejects = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert (len(index), [row["key"] for row in rejects]) == (24, ["a.parquet"])


def test_a_source_of_one_broken_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("no tar")
    with pytest.raises(UserError, match=r"no image found in .*; a\.tar is unreadable: .*header"):
        list_images(GalleryConfig(images=str(tmp_path)), "images")


def test_a_parquet_row_without_a_key_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a", None], "image": [b"1", b"2"]}), tmp_path / "a.parquet")
    index, rejects = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert contents(index) == {"a": b"1"}
    assert [(row["key"], row["reason"]) for row in rejects] == [("a.parquet row 1", "no_key")]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [b""]},
        {"key": ["a"]},
        {"key": [1], "image": [b""]},
        {"key": [None], "image": [b""]},
        {"key": ["a"], "image": ["a.jpg"]},
        {"key": ["a"], "image": [{"path": "a.jpg"}]},
    ],
)
def test_other_columns_are_named(tmp_path: Path, columns: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has the columns .*; give it `key`"):
        list_images(GalleryConfig(images=str(tmp_path)), "images")


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


def test_several_splits_are_joined(tmp_path: Path, photo_folder: Path, expected: dict[str, bytes]) -> None:
    names = sorted(expected)
    files = [tmp_path / "split.dress.json", tmp_path / "split.shirt.json"]
    for file, split in zip(files, (names[:3], names[2:6]), strict=True):
        file.write_text(json.dumps(split))
    index, rejects = list_images(GalleryConfig(images=str(photo_folder), split=list(map(str, files))), "images")
    assert index["key"].to_pylist() == names[:6]
    assert rejects == []


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
    with pytest.raises(UserError, match=r"none\.json: cannot be read as JSON"):
        list_images(GalleryConfig(images=str(tmp_path), split=str(tmp_path / "none.json")), "images")
    (tmp_path / "numbers.json").write_text("[1, [2]]")
    with pytest.raises(UserError, match=r"numbers\.json: expected a list of names"):
        list_images(GalleryConfig(images=str(tmp_path), split=str(tmp_path / "numbers.json")), "images")


@pytest.mark.parametrize("name", ["plain", "my ph#o%20tos?"])
def test_a_scheme_is_kept_and_names_are_quoted(
    name: str, tmp_path: Path, photo_folder: Path, expected: dict[str, bytes]
) -> None:
    folder = photo_folder.rename(tmp_path / name)
    first = min(expected)
    (folder / f"{first}.jpg").rename(folder / f"a #{first}.jpg")
    renamed = {f"a #{key}" if key == first else key: content for key, content in expected.items()} | {"row": b"bytes"}
    pq.write_table(pa.table({"key": ["row"], "image": [b"bytes"]}), folder / "a.parquet")
    for source in (folder.as_uri(), folder.as_uri() + "/"):
        index, _ = list_images(GalleryConfig(images=source), "images")
        assert all(uri.startswith("file:///") for uri in index["uri"].to_pylist())
        assert contents(index) == renamed


def test_a_single_file_with_a_scheme(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["row"], "image": [b"bytes"]}), tmp_path / "a.parquet")
    index, _ = list_images(GalleryConfig(images=(tmp_path / "a.parquet").as_uri()), "images")
    assert index["uri"].to_pylist() == [(tmp_path / "a.parquet").as_uri()]
    assert contents(index) == {"row": b"bytes"}


def test_the_query_of_a_uri_stays_behind_the_path() -> None:
    source = "s3://bucket/photos?region=us-east-1&endpoint_override=localhost:9000"
    location = _location("bucket/photos/a b.jpg", source, "bucket/photos")
    assert location == "s3://bucket/photos/a%20b.jpg?region=us-east-1&endpoint_override=localhost:9000"
    assert filesystem(location)[1] == "bucket/photos/a b.jpg"


def test_a_parquet_file_that_changed_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": ["row"], "image": [b"bytes"]}), path)
    with pytest.raises(OSError, match="row 3 cannot be read"):
        BytesReader().read(str(path), 3, 0)
    path.write_text("something else")
    with pytest.raises(OSError, match="row 0 cannot be read"):
        BytesReader().read(str(path), 0, 0)
