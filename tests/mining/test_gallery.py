import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts import Output
from cluster.config import DecodeResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.stage import Limit, Source
from mining import tables
from mining.config import CaptionsConfig, GalleryConfig, IngestConfig
from mining.gallery import GROUPS, encoded_images, image_bytes, keys, read_images
from mining.ingest import IngestGallery, _starts
from mining.sources import BytesReader
from tests.mining.stages import ingest_captions, ingest_gallery, ingest_triplets
from tests.stages import running

RESOURCES = DecodeResources(decode_tasks=2)
OPTIONS = IngestConfig(galleries={}, triplets={}, shard_rows=10)


def ingest(folder: Path, output: Output, monitor: Monitor, copy_images: bool = True) -> Output:
    ingest_gallery(output, "shop", GalleryConfig(images=str(folder), copy_images=copy_images), OPTIONS, RESOURCES, monitor)
    return output


def test_parts_are_bounded_in_rows_and_in_bytes() -> None:
    lengths = np.array([5, 5, 5, 5, 100, 1, 1, 1, 1])
    assert _starts(lengths, most_rows=3, most_bytes=12) == [0, 2, 4, 5, 8, 9]
    assert _starts(np.empty(0, int), most_rows=3, most_bytes=12) == [0]


def test_bad_files_are_rejected_counted_and_nothing_else_is_lost(
    ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor
) -> None:
    content = sorted(photo_folder.iterdir())[0].read_bytes()
    (photo_folder / "empty.jpg").touch()
    (photo_folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (photo_folder / "text.jpg").write_text("no image")
    output = ingest(photo_folder, Output(str(tmp_path / "out")), monitor)
    reasons = dict(zip(output.rejects()["key"].to_pylist(), output.rejects()["reason"].to_pylist(), strict=True))
    assert reasons == {"empty": "empty_file", "cut": "truncated", "text": "not_an_image"}
    assert sum(output.part_rows().values()) == 24
    assert len(output.parts()) == 3
    assert monitor.total == monitor.advanced == 27


def test_copied_and_indexed_galleries_have_the_same_images(
    ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor
) -> None:
    copied = ingest(photo_folder, Output(str(tmp_path / "copied")), monitor)
    indexed = ingest(photo_folder, Output(str(tmp_path / "indexed")), monitor, copy_images=False)
    assert keys(copied) == keys(indexed)
    ids = list(keys(copied).values())
    assert read_images([copied], ids) == read_images([indexed], ids)
    assert indexed.read_parts(tables.GALLERY, ["image"])["image"].null_count == 24
    with pytest.raises(KeyError, match="none of the galleries"):
        read_images([copied], [1])


def test_many_images_are_mapped_from_files_of_the_node(
    gallery: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("mining.gallery.HELD_IMAGES", 3)
    ids = np.array(sorted(keys(gallery).values()))[::2]
    held, mapped = (encoded_images([gallery], some) for some in (ids[:3], ids))
    assert isinstance(held, dict)
    assert dict(mapped) == read_images([gallery], ids)
    assert dict(encoded_images([gallery], ids)) == dict(mapped)
    assert len(list(tmp_path.glob("*/*.images"))) == 1
    with pytest.raises(KeyError, match="5"):
        mapped[5]
    with pytest.raises(KeyError, match=r"1 images are in none of the galleries, such as 1"):
        encoded_images([gallery], np.append(ids, 1))


def test_a_file_that_is_gone_spoils_its_own_row_alone(
    ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor
) -> None:
    indexed = ingest(photo_folder, Output(str(tmp_path / "indexed")), monitor, copy_images=False)
    gone = sorted(photo_folder.iterdir())[1]
    gone.unlink()
    reader, read = BytesReader(), {}
    for row in indexed.read_parts(tables.GALLERY).to_pylist():
        if row["key"] == gone.stem:
            with pytest.raises(FileNotFoundError):
                image_bytes(row, reader)
        else:
            read[row["key"]] = image_bytes(row, reader)
    assert read == {path.stem: path.read_bytes() for path in photo_folder.iterdir()}


def test_a_source_with_a_scheme_can_be_indexed_in_place(
    ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor
) -> None:
    output = Output(str(tmp_path / "out"))
    config = GalleryConfig(images=photo_folder.as_uri(), copy_images=False)
    ingest_gallery(output, "shop", config, OPTIONS, RESOURCES, monitor)
    rows = output.read_parts(tables.GALLERY, ["key", "uri"]).to_pylist()
    assert {row["uri"] for row in rows} == {path.as_uri() for path in photo_folder.iterdir()}
    assert len(read_images([output], keys(output).values())) == 24


def test_ingest_goes_on_from_the_parts_that_exist(
    ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor
) -> None:
    output = ingest(photo_folder, Output(str(tmp_path / "out")), monitor)
    before = {name: output.read_bytes(name) for name in output.parts()}
    (tmp_path / "out" / "part-00001.parquet").unlink()
    monitor.advanced = 0
    ingest(photo_folder, output, monitor)
    assert {name: output.read_bytes(name) for name in output.parts()} == before
    assert (monitor.resumed, monitor.advanced) == (14, 10)


@pytest.fixture
def gallery(ray_session: None, photo_folder: Path, tmp_path: Path, monitor: Monitor) -> Output:
    return ingest(photo_folder, Output(str(tmp_path / "gallery")), monitor)


def test_triplets_of_every_form(gallery: Output, tmp_path: Path, monitor: Monitor) -> None:
    a, b = sorted(keys(gallery))[:2]
    rows = [
        {"pairid": 1, "reference": a, "target": b, "captions": ["make it red", " "]},
        {"pairid": 2, "reference": a, "target_hard": b, "caption": "in a bag", "img_set": {"id": 36}},
        {"candidate": b, "target": a, "captions": ["is green", "is round"]},
        {"pairid": 4, "reference": a, "target": "ghost", "captions": ["x"]},
        {"pairid": 5, "reference": a, "target": b, "captions": [""]},
    ]
    file = tmp_path / "triplets.json"
    file.write_text(json.dumps(rows))
    output = Output(str(tmp_path / "triplets"))
    ingest_triplets(output, gallery, [str(file)], monitor)
    table = output.read_parts(tables.TRIPLETS).to_pylist()
    assert [row["deltas"] for row in table] == [["make it red"], ["in a bag"], ["is green", "is round"]]
    assert [row["group_id"] is None for row in table] == [True, False, True]
    assert {row["source"] for row in table} == {"human"}
    rejects = output.rejects().to_pylist()
    assert [(row["key"], row["reason"]) for row in rejects] == [("4", "unknown_image"), ("5", "empty_delta")]


def test_several_files_of_triplets_are_joined(gallery: Output, tmp_path: Path, monitor: Monitor) -> None:
    a, b = sorted(keys(gallery))[:2]
    files = []
    for name, reference, target in (("cap.dress.json", a, b), ("cap.shirt.json", b, a), ("more/cap.dress.json", b, a)):
        files.append(tmp_path / name)
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(json.dumps([{"candidate": reference, "target": target, "captions": ["is red", "is longer"]}]))
    output = Output(str(tmp_path / "triplets"))
    ingest_triplets(output, gallery, [str(file) for file in files[:2]], monitor)
    table = output.read_parts(tables.TRIPLETS)
    assert table["reference_id"].to_pylist() == table["target_id"].to_pylist()[::-1]
    assert len(set(table["triplet_id"].to_pylist())) == 2
    with pytest.raises(UserError, match="two rows have the same id"):
        ingest_triplets(output, gallery, [str(file) for file in files], monitor)


def test_members_of_groups_are_kept_beside_the_triplets(gallery: Output, tmp_path: Path, monitor: Monitor) -> None:
    known = keys(gallery)
    members = sorted(known)[:6]
    file = tmp_path / "cap.json"
    row = {"pairid": 1, "reference": members[0], "target_hard": members[1], "caption": "x"}
    file.write_text(json.dumps([{**row, "img_set": {"id": 36, "members": members}}]))
    output = Output(str(tmp_path / "triplets"))
    ingest_triplets(output, gallery, [str(file)], monitor)
    [group] = output.read_table(GROUPS, tables.GROUPS).to_pylist()
    assert group["image_ids"] == [known[key] for key in members]
    assert group["group_id"] == output.read_parts(tables.TRIPLETS)["group_id"][0].as_py()
    assert list(output.part_rows().values()) == [1]


def test_captions_are_cut_at_the_separator(gallery: Output, tmp_path: Path, monitor: Monitor) -> None:
    a = min(keys(gallery))
    file = tmp_path / "captions.json"
    file.write_text(json.dumps([{"image": a, "caption": "red apple: sweet"}, {"image": a, "caption": ": x"}]))
    output = Output(str(tmp_path / "captions"))
    ingest_captions(output, gallery, CaptionsConfig(gallery="shop", file=str(file), until=":"), monitor)
    assert output.read_parts(tables.CAPTIONS)["caption"].to_pylist() == ["red apple"]
    assert output.rejects()["reason"].to_pylist() == ["empty_caption"]


def test_names_to_leave_out_are_in_no_gallery(ray_session: None, photo_folder: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in photo_folder.iterdir())
    (tmp_path / "held-out.json").write_text(json.dumps([*names[:3], "none"]))
    output = Output(str(tmp_path / "gallery"))
    IngestGallery(
        name="shop",
        images=Source("images", str(photo_folder)),
        without=Source("without", str(tmp_path / "held-out.json")),
        shard_rows=10,
        shard_bytes=10**9,
        max_pixels=10**8,
        max_reject_fraction=Limit(0),
        resources=RESOURCES,
    ).work(output, running())
    assert sorted(keys(output)) == names[3:]
    assert not len(output.rejects())
