import gzip
import inspect
import json
import os
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifacts import filesystem, fingerprint
from cluster.errors import UserError
from mining.config import GalleryConfig
from mining.images import SUFFIXES
from mining.sources import BytesReader, _location, list_images


def contents(table: pa.Table) -> dict[str, bytes]:
    reader = BytesReader()
    return {row["key"]: reader.read(row["uri"], row["offset"], row["length"]) for row in table.to_pylist()}


@pytest.fixture
def expected(photos: list[tuple[str, bytes]]) -> dict[str, bytes]:
    return dict(photos[:24])


def test_folder(photo_folder: Path, expected: dict[str, bytes]) -> None:
    (photo_folder / "notes.txt").write_text("no image")
    index, rejects, _ = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert contents(index) == expected
    assert index["key"].to_pylist() == sorted(expected)
    assert rejects == []


def test_tar(tmp_path: Path, photo_folder: Path, expected: dict[str, bytes]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in sorted(photo_folder.iterdir()):
            archive.add(path, arcname=path.name)
    index, *_ = list_images(GalleryConfig(images=str(tmp_path / "a.tar")), "images")
    assert contents(index) == expected


def test_parquet_of_several_row_groups(tmp_path: Path, expected: dict[str, bytes]) -> None:
    table = pa.table({"key": list(expected), "image": list(expected.values())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    index, *_ = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert contents(index) == expected


def test_parquet_of_hugging_faces_layout(tmp_path: Path, expected: dict[str, bytes]) -> None:
    images = [{"bytes": content, "path": f"{key}.jpg"} for key, content in expected.items()]
    pq.write_table(pa.table({"key": list(expected), "image": [*images[:-1], None]}), tmp_path / "a.parquet", row_group_size=7)
    index, *_ = list_images(GalleryConfig(images=str(tmp_path)), "images")
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
    index, rejects, _ = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert [(row["key"], row["reason"]) for row in rejects] == [(name, "unreadable")]
    kept = [key for key in index["key"].to_pylist() if key.startswith("tar/")]
    assert bool(kept) == some_kept
    assert len(index) == len(expected) + len(kept) < 2 * len(expected)


def test_a_broken_page_is_rejected_with_its_file(tmp_path: Path, photo_folder: Path) -> None:
    path = photo_folder / "a.parquet"
    pq.write_table(pa.table({"key": ["row"], "image": [b"bytes"]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes([255]) * 40 + content[44:])
    index, rejects, _ = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert (len(index), [row["key"] for row in rejects]) == (24, ["a.parquet"])


def test_a_source_of_one_broken_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text("no tar")
    with pytest.raises(UserError, match=r"no image found in .*; a\.tar is unreadable: .*header"):
        list_images(GalleryConfig(images=str(tmp_path)), "images")


def test_a_parquet_row_without_a_key_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a", None], "image": [b"1", b"2"]}), tmp_path / "a.parquet")
    index, rejects, _ = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert contents(index) == {"a": b"1"}
    assert [(row["key"], row["reason"]) for row in rejects] == [("a.parquet row 1", "no_key")]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [b""]},
        {"key": ["a"]},
        {"key": [1.5], "image": [b""]},
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
    index, rejects, _ = list_images(GalleryConfig(images=str(photo_folder), split=str(listed)), "images")
    assert index["key"].to_pylist() == names
    assert [(row["key"], row["reason"]) for row in rejects] == [("ghost", "missing_image")]
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps({"first": f"./{names[0]}.jpg"}))
    index, *_ = list_images(GalleryConfig(images=str(photo_folder), split=str(mapped)), "images")
    assert contents(index) == {"first": expected[names[0]]}


def test_several_splits_are_joined(tmp_path: Path, photo_folder: Path, expected: dict[str, bytes]) -> None:
    names = sorted(expected)
    files = [tmp_path / "split.dress.json", tmp_path / "split.shirt.json"]
    for file, split in zip(files, (names[:3], names[2:6]), strict=True):
        file.write_text(json.dumps(split))
    index, rejects, _ = list_images(GalleryConfig(images=str(photo_folder), split=list(map(str, files))), "images")
    assert index["key"].to_pylist() == names[:6]
    assert rejects == []


def test_second_use_of_a_name_is_rejected(photo_folder: Path) -> None:
    first = sorted(photo_folder.iterdir())[0]
    first.with_suffix(".png").write_bytes(first.read_bytes())
    index, rejects, _ = list_images(GalleryConfig(images=str(photo_folder)), "images")
    assert len(index) == 24
    assert [(row["key"], row["reason"]) for row in rejects] == [(first.stem, "duplicate_name")]


@pytest.mark.parametrize(
    "keys",
    [
        pa.array([1, 2]),
        pa.array(["1", "2"]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        pa.array([1, 2], pa.int64()).dictionary_encode(),
        pa.array(["1", "2"], pa.large_string()),
    ],
)
def test_keys_are_texts_categories_or_numbers(tmp_path: Path, keys: pa.Array) -> None:
    pq.write_table(pa.table({"key": keys, "image": [b"a", b"b"]}), tmp_path / "a.parquet")
    assert contents(list_images(GalleryConfig(images=str(tmp_path)), "images").index) == {"1": b"a", "2": b"b"}


def test_hugging_faces_path_is_a_name(tmp_path: Path) -> None:
    rows = [{"bytes": b"a", "path": "x/1.jpg"}, {"bytes": b"b", "path": None}]
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), tmp_path / "a.parquet")
    index, rejects, _ = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert contents(index) == {"x/1": b"a"}
    assert [(row["key"], row["reason"]) for row in rejects] == [("a.parquet row 1", "no_key")]


def listed(folder: Path) -> tuple[list[str], list[tuple[str, str]], dict[str, int]]:
    index, rejects, left_out = list_images(GalleryConfig(images=str(folder)), "images")
    return index["key"].to_pylist(), [(row["key"], row["reason"]) for row in rejects], left_out


def test_every_file_is_an_image_a_reject_or_left_out(tmp_path: Path) -> None:
    images = [f"{suffix[1:]}{suffix}" for suffix in (".avif", ".jfif", ".jpe", ".jp2", ".ppm", ".apng", ".mpo", ".JPG", ".dib")]
    images[-2] = "upper.JPG"
    junk = ["._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "@eaDir/a.jpg", "__MACOSX/._a.jpg", "Thumbs.db", ".DS_Store"]
    others = ["b.tar.gz", "c.zip", "d.pq", "e.heic", "README", "f.txt", "g.txt"]
    for name in images + junk + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    keys, rejects, left_out = listed(tmp_path)
    known = [name for name in images if name != "dib.dib"]
    assert keys == sorted(name.rpartition(".")[0] for name in known)
    assert rejects == []
    assert left_out["hidden or system files"] == len(junk)
    assert (left_out[".tar.gz"], left_out[".txt"], left_out[".dib"], left_out["files without suffix"]) == (1, 2, 1, 1)
    assert sum(left_out.values()) + len(keys) == len(images + junk + others)
    assert any("pillow-heif" in what for what in left_out) or ".heic" in SUFFIXES


def test_no_image_says_what_was_found(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "b.zip", "c.zip", "d.pq"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"no image found in .*; found 2 \.zip, 1 \.tar\.gz, 1 \.pq"):
        list_images(GalleryConfig(images=str(tmp_path)), "images")
    with pytest.raises(UserError, match=r"no image found in .*; found 1 \.zip"):
        list_images(GalleryConfig(images=str(tmp_path / "b.zip")), "images")


def test_each_real_path_is_listed_once(tmp_path: Path) -> None:
    folder, outside = tmp_path / "photos", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    for path in (folder / "a.jpg", folder / "sub" / "b.jpg", outside / "c.jpg", outside / "deep" / "d.jpg"):
        path.write_bytes(b"x")
    (folder / "sub" / "up").symlink_to(folder)  # a loop
    (folder / "again.jpg").symlink_to(folder / "a.jpg")
    (folder / "out").symlink_to(outside)
    (folder / "twice").symlink_to(outside / "deep")
    (outside / "back").symlink_to(folder / "sub")
    (folder / "one.jpg").symlink_to(outside / "c.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (folder / "self").symlink_to(folder / "self")
    keys, rejects, left_out = listed(folder)
    assert len(keys) == 4
    assert {"a", "sub/b"} < set(keys)
    assert rejects == [("gone.jpg", "unreadable"), ("self", "unreadable")]
    assert sum(left_out.values()) == 5
    assert len(fingerprint(str(folder)) or ()) == 4


def test_links_into_hidden_folders_are_followed(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "blob").write_bytes(b"x")
    (tmp_path / "a.jpg").symlink_to(".git/blob")
    assert listed(tmp_path) == (["a"], [], {"hidden or system files": 1})


def test_pipes_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    os.mkfifo(tmp_path / "b.jpg")
    assert listed(tmp_path) == (["a"], [], {"pipes, sockets and devices": 1})


def test_names_that_are_not_utf8_are_one_reject_each(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    for name in (b"b\xff.jpg", b"c\xe9.jpg"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    keys, rejects, _ = listed(tmp_path)
    assert keys == ["a"]
    assert rejects == [("b\\udcff.jpg", "not_utf8"), ("c\\udce9.jpg", "not_utf8")]
    assert len(fingerprint(str(tmp_path)) or ()) == 3


def member(archive: tarfile.TarFile, name: str, content: bytes = b"x", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, BytesIO(content) if info.isreg() else None)


def test_links_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member(archive, "x/a.jpg", b"one")
        member(archive, "x/b.jpg", b"", type=tarfile.LNKTYPE, linkname="x/a.jpg")
        member(archive, "x/again.jpg", b"", type=tarfile.SYMTYPE, linkname="a.jpg")
        member(archive, "blobs/1", b"two")
        member(archive, "x/c.jpg", b"", type=tarfile.SYMTYPE, linkname="../blobs/1")
        member(archive, "x/gone.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        member(archive, "x/._a.jpg")
        member(archive, "pipe.jpg", b"", type=tarfile.FIFOTYPE)
    index, rejects, left_out = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert contents(index) == {"x/a": b"one", "x/b": b"one", "x/c": b"two"}
    assert [(row["key"], row["reason"]) for row in rejects] == [("a.tar x/gone.jpg", "unreadable")]
    assert sum(left_out.values()) == 4


def test_one_bad_member_is_one_reject(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        member(archive, "a.jpg")
        member(archive, "b\udcff.jpg")
        archive.fileobj.write(_header("c.jpg", 100 * 2**30))
        archive.offset += 512
    keys, rejects, _ = listed(tmp_path)
    assert keys == ["a"]
    assert ("a.tar b\\udcff.jpg", "not_utf8") in rejects
    assert ("a.tar c.jpg", "unreadable") in rejects


@pytest.mark.parametrize("size", ["-512", "-1536", "-4096"])
def test_a_member_of_negative_size_is_no_endless_loop(tmp_path: Path, size: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member(archive, "a.jpg")
        member(archive, "b.jpg", pax_headers={"size": size})
        member(archive, "c.jpg")
    keys, rejects, _ = listed(tmp_path)
    assert keys == ["a"]
    assert rejects == [("a.tar", "unreadable")]


def test_a_tar_that_goes_on_behind_its_end_says_so(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            member(archive, name)
    (tmp_path / "a.jpg.tar").write_bytes(b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir())))
    (tmp_path / "b.jpg.tar").unlink()
    index, rejects, _ = list_images(GalleryConfig(images=str(tmp_path)), "images")
    assert index["key"].to_pylist() == ["a"]
    assert "it goes on behind its end" in rejects[0]["detail"]


def test_folders_may_be_nested_deeper_than_calls(tmp_path: Path) -> None:
    (folder := tmp_path.joinpath(*["d"] * 400)).mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"x")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 200)
    try:
        keys, *_ = listed(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert keys == ["d/" * 400 + "a"]


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_parquet_key_that_is_not_utf8_is_one_reject(tmp_path: Path) -> None:
    bad = pa.array([b"a", b"b\xff"]).view(pa.string())
    pq.write_table(pa.table({"key": bad, "image": [b"1", b"2"]}), tmp_path / "a.parquet")
    assert listed(tmp_path)[:2] == (["a"], [("a.parquet row 1", "not_utf8")])


def test_decomposed_and_composed_names_are_one(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    decomposed = unicodedata.normalize("NFD", "café")
    (tmp_path / "photos" / f"{decomposed}.jpg").write_bytes(b"x")
    assert listed(tmp_path / "photos")[0] == ["café"]
    for names in (["café"], [decomposed], {"café": f"{decomposed}.jpg"}, {decomposed: "café.jpg"}):
        (tmp_path / "split.json").write_text(json.dumps(names))
        index, rejects, _ = list_images(GalleryConfig(images=str(tmp_path / "photos"), split=str(tmp_path / "split.json")), "x")
        assert (index["key"].to_pylist(), rejects) == (["café"], [])


def test_numbers_are_names_in_a_split(tmp_path: Path) -> None:
    (tmp_path / "7.jpg").write_bytes(b"x")
    (tmp_path / "split.json").write_text("[7]")
    index, *_ = list_images(GalleryConfig(images=str(tmp_path), split=str(tmp_path / "split.json")), "images")
    assert index["key"].to_pylist() == ["7"]


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        (["a.image.jpg", "a.caption.txt", "b.image.jpg", "b.caption.txt"], ["a", "b"]),
        (["x/a.image.jpg", "x/a.caption.json"], ["x/a"]),
        (["a.v1.jpg", "a.v1.txt"], ["a.v1"]),
        (["IMG.1.jpg", "IMG.2.jpg"], ["IMG.1", "IMG.2"]),
        (["IMG.1.jpg", "IMG.2.jpg", "IMG.txt"], ["IMG.1", "IMG.2"]),
        (["IMG.1.jpg", "IMG.1.txt", "IMG.2.jpg", "IMG.2.txt"], ["IMG.1", "IMG.2"]),
    ],
)
def test_a_webdatasets_keys(tmp_path: Path, members: list[str], keys: list[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in members:
            member(archive, name)
    assert listed(tmp_path)[0] == keys


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
        index, *_ = list_images(GalleryConfig(images=source), "images")
        assert all(uri.startswith("file:///") for uri in index["uri"].to_pylist())
        assert contents(index) == renamed


def test_a_single_file_with_a_scheme(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["row"], "image": [b"bytes"]}), tmp_path / "a.parquet")
    index, *_ = list_images(GalleryConfig(images=(tmp_path / "a.parquet").as_uri()), "images")
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
    content = path.read_bytes()
    path.write_bytes(content.replace(b"image", b"imag\xff"))  # a column's name that is not UTF-8
    with pytest.raises(OSError, match="row 0 cannot be read"):
        BytesReader().read(str(path), 0, 0)
    path.write_text("something else")
    with pytest.raises(OSError, match="row 0 cannot be read"):
        BytesReader().read(str(path), 0, 0)
