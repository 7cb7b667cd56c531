import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from mining.config import GalleryConfig
from mining.labelled import joined, read_captions, read_triplets
from mining.sources import list_images

KNOWN = {f"dev-{i}": i for i in range(8)}
GOOD = {"pairid": 0, "reference": "dev-0", "target": "dev-1", "captions": ["x"]}


def write(folder: Path, rows: Any) -> str:
    file = folder / "cap.json"
    file.write_text(json.dumps(rows))
    return str(file)


def cirr(pairid: int, reference: int, target: int, members: list[int], group: int = 36) -> dict[str, Any]:
    """A row in the form of CIRR's annotations."""
    return {
        "pairid": pairid,
        "reference": f"dev-{reference}",
        "target_hard": f"dev-{target}",
        "target_soft": {f"dev-{target}": 1.0},
        "caption": "show three bottles of soft drink",
        "img_set": {"id": group, "members": [f"dev-{i}" for i in members], "reference_rank": 2, "target_rank": 3},
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"captions": None}, "empty_delta"),
        ({"captions": []}, "empty_delta"),
        ({"captions": [None, " "]}, "empty_delta"),
        ({"captions": 5}, "malformed_row"),
        ({"captions": ["x", 5]}, "malformed_row"),
        ({"reference": ["dev-0"]}, "malformed_row"),
        ({"reference": None}, "malformed_row"),
        ({"target": {}}, "malformed_row"),
        ({"group": []}, "malformed_row"),
        ({"img_set": {"id": 1, "members": 5}}, "malformed_row"),
        ({"img_set": {"id": 1, "members": ["dev-0", "dev-7"]}}, "malformed_row"),
        ({"target": "ghost"}, "unknown_image"),
        ({"target": "dev-0"}, "same_image"),
        ({"target": "dev-0.png"}, "same_image"),
        ({"captions": ["\ud800"]}, "not_utf8"),
        ({"reference": "\udcff"}, "not_utf8"),
        ({"other": {"deep": ["\ud800"]}}, "not_utf8"),
        ({}, "duplicate_name"),
    ],
)
def test_one_bad_triplet_is_rejected_alone(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    name = 0 if reason == "duplicate_name" else 1
    triplets, _, rejects = read_triplets(write(tmp_path, [GOOD, {**GOOD, "pairid": name, **changes}]), KNOWN)
    assert [row["reference_id"] for row in triplets] == [0]
    assert [(row["key"], row["reason"]) for row in rejects] == [(str(name), reason)]


def test_a_row_that_was_rejected_does_not_take_its_name(tmp_path: Path) -> None:
    triplets, _, rejects = read_triplets(write(tmp_path, [{**GOOD, "captions": []}, GOOD]), KNOWN)
    assert len(triplets) == len(rejects) == 1


@pytest.mark.parametrize(
    ("captions", "expected"),
    [(["is BLACK.", " has, sleeves?"], "Is black and has, sleeves"), ([", a.b. ", "Is Red"], "A.b and Is Red")],
)
def test_captions_are_joined_as_fashioniq_does(captions: list[str], expected: str) -> None:
    assert joined(captions) == expected


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["is red.", "has Sleeves?"], ["Is red and has Sleeves", "Has sleeves and is red", "Is red", "Has sleeves"]),
        (["is red.", " ?"], ["Is red"]),
        (["is red", "is long", "is new"], ["Is red", "Is long", "Is new"]),
    ],
)
def test_two_captions_are_trained_on_joined_both_ways_and_alone(
    tmp_path: Path, captions: list[str], expected: list[str]
) -> None:
    (row,), _, rejects = read_triplets(write(tmp_path, [{**GOOD, "captions": captions}]), KNOWN, join=True)
    assert row["deltas"] == expected
    assert not rejects


def test_captions_of_punctuation_alone_join_to_nothing(tmp_path: Path) -> None:
    triplets, _, (rejected,) = read_triplets(write(tmp_path, [{**GOOD, "captions": [".", "?"]}]), KNOWN, join=True)
    assert not triplets
    assert rejected["reason"] == "empty_delta"


def test_groups_are_those_whose_members_are_all_in_the_gallery(tmp_path: Path) -> None:
    rows = [
        cirr(1, 4, 2, [0, 1, 2, 3, 4, 5]),
        cirr(2, 2, 0, [5, 4, 3, 2, 1, 0]),
        cirr(3, 0, 1, [0, 1, 2, 3, 4, 99], group=37),
        cirr(4, 0, 1, [0, 1, 2], group=36),
        {**GOOD, "pairid": 5},
    ]
    triplets, groups, rejects = read_triplets(write(tmp_path, rows), KNOWN)
    assert len(triplets) == 4
    assert groups == [{"group_id": triplets[0]["group_id"], "image_ids": [0, 1, 2, 3, 4, 5]}]
    assert [row["group_id"] == triplets[0]["group_id"] for row in triplets] == [True, True, False, False]
    assert [(row["key"], row["reason"]) for row in rejects] == [("4", "malformed_row"), ("group 37", "incomplete_group")]
    assert "'dev-99'" in rejects[1]["detail"]


def test_nulls_of_a_parquet_file_are_absent_fields(tmp_path: Path) -> None:
    columns = ("pairid", "reference", "candidate", "target", "captions", "caption", "img_set")
    rows = [
        {"reference": "dev-0", "target": "dev-1", "caption": "x"},
        {"candidate": "dev-1", "target": "dev-2", "captions": ["y"]},
    ]
    rows.append({"reference": "dev-0", "target": "dev-3", "caption": "z", "img_set": {"id": 3, "members": ["dev-0", "dev-3"]}})
    pq.write_table(pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), tmp_path / "t.parquet")
    triplets, groups, rejects = read_triplets(str(tmp_path / "t.parquet"), KNOWN)
    assert [row["deltas"] for row in triplets] == [["x"], ["y"], ["z"]]
    assert [group["image_ids"] for group in groups] == [[0, 3]]
    assert rejects == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "dev-1", "caption": None}, "empty_caption"),
        ({"image": "dev-1", "caption": ": x"}, "empty_caption"),
        ({"image": "dev-1", "caption": 5}, "malformed_row"),
        ({"image": ["dev-1"], "caption": "x"}, "malformed_row"),
        ({"caption": "x"}, "malformed_row"),
        ({"image": "ghost", "caption": "x"}, "unknown_image"),
    ],
)
def test_one_bad_caption_is_rejected_alone(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    captions, rejects = read_captions(write(tmp_path, [{"image": "dev-0", "caption": "apple: red"}, row]), KNOWN, until=":")
    assert captions == [{"image_id": 0, "caption": "apple"}]
    assert [(reject["key"], reject["reason"]) for reject in rejects] == [("row 1", reason)]


def captions_of(file: Path, known: dict[str, int] = KNOWN) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Caption by image, and key and reason of the rejects."""
    captions, rejects = read_captions(str(file), known, until=None)
    return {row["image_id"]: row["caption"] for row in captions}, [(row["key"], row["reason"]) for row in rejects]


def test_llavas_conversations_are_captions(tmp_path: Path) -> None:
    def talk(image: str, *turns: tuple[str, str]) -> dict[str, Any]:
        return {"id": image, "image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}

    rows = [
        talk("GCC/dev-1.jpg", ("human", "<image>\nDescribe it."), ("gpt", "a red bag"), ("human", "More."), ("gpt", "no")),
        talk("GCC/dev-2", ("human", "Describe it.\n<image>"), ("gpt", "two apples")),
        talk("GCC/dev-2.jpg", ("human", "Describe it.")),
        {"image": "GCC/dev-1.jpg", "conversations": [{"from": "gpt"}]},
        talk("GCC/ghost.jpg", ("gpt", "a bag")),
    ]
    captions, rejects = captions_of(Path(write(tmp_path, rows)), {"GCC/dev-1": 1, "GCC/dev-2": 2})
    assert captions == {1: "a red bag", 2: "two apples"}
    assert rejects == [("row 2", "empty_caption"), ("row 3", "malformed_row"), ("row 4", "unknown_image")]


def test_a_dot_in_a_key_is_no_suffix(tmp_path: Path) -> None:
    rows = [{"image": "v1.2", "caption": "x"}, {"image": "a.jpg", "caption": "y"}]
    assert captions_of(Path(write(tmp_path, rows)), {"v1.2": 1, "a.jpg": 2}) == ({1: "x", 2: "y"}, [])


def tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return file


def test_a_webdatasets_keys_are_those_of_its_gallery(tmp_path: Path, photos: list[tuple[str, bytes]]) -> None:
    folder, images = tmp_path / "wds", [content for _, content in photos[:6]]
    folder.mkdir()
    first = {
        "00/a.jpg": images[0],
        "00/a.txt": b"a red bag\n",
        "00/a.json": b'{"caption": "of the json", "width": 3}',
        "./b.v2.jpg": images[1],
        "./b.v2.json": b'{"caption": "two apples"}',
        "c.jpg": images[2],
        "c.json": b"{broken",
        "d.jpg": images[3],
        "d.json": b'{"caption": null}',
    }
    second = {"e.txt": b"no image", "f.jpg": images[4], "f.txt": "grün".encode(), "g.jpg": images[5]}
    tar(folder / "0.tar", first)
    tar(folder / "1.tar", second)
    index, *_ = list_images(GalleryConfig(images=str(folder)), "images")
    known = {key: place for place, key in enumerate(index["key"].to_pylist())}
    assert set(known) == {"00/a", "b.v2", "c", "d", "f", "g"}
    captions, rejects = captions_of(folder, known)
    assert captions == {known["00/a"]: "a red bag", known["b.v2"]: "two apples", known["f"]: "grün"}
    assert [reason for _, reason in rejects] == ["empty_caption", "empty_caption", "unknown_image"]
    assert captions_of(folder / "1.tar", known)[0] == {known["f"]: "grün"}


def test_one_parquet_file_is_gallery_and_captions(tmp_path: Path, photos: list[tuple[str, bytes]]) -> None:
    rows = [{"key": key, "image": content, "caption": f"photo {key}"} for key, content in photos[:3]]
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([*rows, {"key": "ghost", "image": b"", "caption": None}]), file)
    index, *_ = list_images(GalleryConfig(images=str(file)), "images")
    known = {key: place for place, key in enumerate(index["key"].to_pylist()) if key != "ghost"}
    captions, rejects = captions_of(file, known)
    assert captions == {known[row["key"]]: row["caption"] for row in rows}
    assert rejects == [("row 3", "unknown_image")]
    assert captions_of(tmp_path, known)[0] == captions  # a folder of such files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", '{"reference": "dev-0.jpg", "target": "dev-1", "captions": ["x"]}\n\n{broken\n'),
        ("t.json", '{"reference": "dev-0.jpg", "target": "dev-1", "captions": ["x"]}\n{"reference": 1}\n'),
        ("t.ndjson", '\ufeff{"reference": "dev-0", "target": "./dev-1.PNG", "text": "x"}\n[1]'),
        ("t.csv", "\ufeffreference,target,caption\ndev-0,dev-1,x\ndev-0,dev-1,x,y\n"),
        ("t.csv", "reference;target;captions\ndev-0;dev-1;\"['x']\"\ndev-0;dev-1\n"),
        ("t.csv", 'reference,target,captions\r\ndev-0.jpg,dev-1.jpg,"[""x""]"\r\nghost,dev-1,x\r\n'),
        ("t.tsv", "reference\ttarget\ttext\ndev-0\tdev-1\tx\ndev-0\tdev-0\tx\n"),
        ("t.json", '[{"reference": "dev-0", "target": "dev-1", "caption": "x"}, null]'),
        ("t.csv", '\n\nreference, target, caption\ndev-0, dev-1, "x"\ndev-0, ghost, x\n'),
        ("t.csv", 'reference,target,caption\ndev-0,dev-1,x\ndev-0,dev-1,"y\ndev-2,dev-3,z\n'),
    ],
)
def test_the_forms_of_labels(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    triplets, _, rejects = read_triplets(str(tmp_path / name), KNOWN)
    assert [(row["reference_id"], row["target_id"], row["deltas"]) for row in triplets] == [(0, 1, ["x"])]
    assert len(rejects) == 1


@pytest.mark.parametrize("cell", ["['x y' 'z']", "['x y'\n 'z']", "['x y', 'z']", '["x y", "z"]', """["x y" 'z']"""])
def test_a_cell_is_the_list_that_pandas_numpy_or_json_wrote(tmp_path: Path, cell: str) -> None:
    quoted = cell.replace('"', '""')
    (tmp_path / "t.csv").write_text(f'reference,target,captions\ndev-0,dev-1,"{quoted}"\n')
    triplets, *_ = read_triplets(str(tmp_path / "t.csv"), KNOWN)
    assert triplets[0]["deltas"] == ["x y", "z"]


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("reference,target,caption,caption\ndev-0,dev-1,x,y\n")
    names = ["image", "reference", "target", "caption", "caption"]
    columns = [pa.array([text]) for text in ("dev-0", "dev-0", "dev-1", "x", "y")]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "t.parquet")
    for read in (
        lambda: read_triplets(str(tmp_path / "t.csv"), KNOWN),
        lambda: read_triplets(str(tmp_path / "t.parquet"), KNOWN),
        lambda: read_captions(str(tmp_path / "t.parquet"), KNOWN, None),
    ):
        with pytest.raises(UserError, match=r"t\.\w+: cannot be read as .*: the column 'caption' comes twice"):
            read()


@pytest.mark.parametrize(
    "odd",
    [pa.array([2**31 - 1], pa.date32()), pa.array([2**62], pa.duration("s")), pa.array([1], pa.timestamp("us", "Mars/X"))],
)
def test_values_that_python_does_not_know_are_one_message(tmp_path: Path, odd: pa.Array) -> None:
    pq.write_table(
        pa.table({"reference": ["dev-0"], "target": ["dev-1"], "caption": ["x"], "when": odd}), tmp_path / "t.parquet"
    )
    with pytest.raises(UserError, match=r"t\.parquet: cannot be read as a Parquet table"):
        read_triplets(str(tmp_path / "t.parquet"), KNOWN)


def test_an_image_without_a_path_names_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": b"x"}], "caption": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="expected the image's name as its path"):
        captions_of(tmp_path / "c.parquet")


def test_linked_captions_and_marks_of_windows_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tar(tmp_path / "a.tar", {"dev-0.txt": b"\xef\xbb\xbfred"}), "a") as archive:
        for name, kind in (("dev-1.txt", tarfile.LNKTYPE), ("dev-2.txt", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "dev-0.txt"
            archive.addfile(link)
    assert captions_of(tmp_path / "a.tar") == ({0: "red", 1: "red", 2: "red"}, [])


def test_labels_in_another_encoding_are_rejected_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("image,caption\ndev-0,red\ndev-1,grün\n".encode("latin-1"))
    assert captions_of(tmp_path / "t.csv") == ({0: "red"}, [("row 1", "not_utf8")])


def test_pandas_categories_and_bad_texts_of_a_parquet_file(tmp_path: Path) -> None:
    names = pa.array(["dev-0", "dev-1"]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))
    texts = pa.array([b"x", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"image": names, "text": texts}), tmp_path / "c.parquet")
    assert captions_of(tmp_path / "c.parquet") == ({0: "x"}, [("row 1", "not_utf8")])
    pq.write_table(
        pa.table({"reference": names, "target": names.take(pa.array([1, 0])), "text": texts}), tmp_path / "t.parquet"
    )
    triplets, _, rejects = read_triplets(str(tmp_path / "t.parquet"), KNOWN)
    assert ([row["deltas"] for row in triplets], [row["reason"] for row in rejects]) == ([["x"]], ["not_utf8"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, None, 2], pa.int32()), texts)
    table = pa.table({"reference": ["dev-0"] * 3, "target": ["dev-1"] * 3, "captions": lists})
    pq.write_table(table, tmp_path / "t.parquet")
    triplets, _, rejects = read_triplets(str(tmp_path / "t.parquet"), KNOWN)
    assert [row["deltas"] for row in triplets] == [["x"]]
    assert [row["reason"] for row in rejects] == ["not_utf8", "empty_delta"]


def test_numbers_and_hugging_faces_path_name_images(tmp_path: Path) -> None:
    assert captions_of(Path(write(tmp_path, [{"image": 7, "text": "x"}])), {"7": 0}) == ({0: "x"}, [])
    pq.write_table(pa.table({"key": [7], "caption": ["x"]}), tmp_path / "a.parquet")
    assert captions_of(tmp_path / "a.parquet", {"7": 0}) == ({0: "x"}, [])
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": "x/7.jpg"}], "caption": ["x"]}), tmp_path / "b.parquet")
    assert captions_of(tmp_path / "b.parquet", {"x/7": 0}) == ({0: "x"}, [])


def test_composed_and_decomposed_names_meet(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for name, key in ((composed, decomposed), (decomposed, composed), (f"{decomposed}.jpg", composed)):
        assert captions_of(Path(write(tmp_path, [{"image": name, "caption": "x"}])), {key: 0}) == ({0: "x"}, [])


def test_a_webdatasets_keys_end_where_images_and_captions_meet(tmp_path: Path) -> None:
    file = tar(
        tmp_path / "a.tar", {"1.image.jpg": b"x", "1.caption.txt": b"red", "2.image.jpg": b"x", "2.caption.txt": b"\xff"}
    )
    assert captions_of(file, {"1": 1, "2": 2}) == ({1: "red"}, [("row 1", "not_utf8")])


def test_a_long_caption_does_not_end_its_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"image,caption\ndev-0,{'x' * 200_000}\ndev-1,red\n")
    captions, rejects = captions_of(tmp_path / "t.csv")
    assert (len(captions[0]), captions[1], rejects) == (200_000, "red", [])


def test_a_folder_of_captions_is_walked_as_a_gallery_is(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"dev-0.jpg": b"x", "dev-0.TXT": b"red"})
    tar(tmp_path / "B.TAR", {"dev-1.jpg": b"x", "dev-1.txt": b"blue"})
    for junk in ("._a.tar", "broken.tar"):
        (tmp_path / junk).write_bytes(b"{" * 2000)
    (tmp_path / "up").symlink_to(tmp_path)
    assert captions_of(tmp_path) == ({0: "red", 1: "blue"}, [("row 2", "unreadable")])


@pytest.mark.parametrize("name", ["broken.tar", "broken.parquet", "none.parquet", "captions.csv"])
def test_unreadable_captions(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{" * 2000)
    if name == "none.parquet":
        pq.write_table(pa.table({"image": ["dev-1"]}), tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: cannot be read as captions"):
        captions_of(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tar or Parquet file"):
        captions_of(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.json", "{", "broken.json: cannot be read as JSON"),
        ("broken.parquet", "{", "broken.parquet: cannot be read as a Parquet table"),
        ("object.json", '{"a": 1}', "expected a list of rows"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_triplets(str(tmp_path / name), KNOWN)
