"""Configs for one's own data, whatever the folders are called."""

import json
from pathlib import Path

import pytest
import yaml

from cluster.app import config as configs
from cluster.app.init import write_config
from cluster.errors import UserError


@pytest.fixture
def triplets(photo_folder: Path, tmp_path: Path) -> str:
    names = sorted(path.stem for path in photo_folder.iterdir())
    rows = [{"reference": names[i % 24], "target": names[(i % 24) ^ 1], "captions": ["x"]} for i in range(60)]
    (tmp_path / "triplets.json").write_text(json.dumps(rows))
    return str(tmp_path / "triplets.json")


@pytest.mark.parametrize(
    ("folder", "name"), [("2024", "2024"), ("my photos", "my-photos"), (".hidden", "hidden"), ("Äpfel", "Äpfel"), ("#", "own")]
)
def test_any_folder_gives_a_config_that_loads(
    folder: str, name: str, photo_folder: Path, triplets: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path / folder, str(photo_folder), triplets, None, None)
    assert configs.load(str(path), []).name == name


@pytest.mark.parametrize("name", ["a: b", "a #b", "it's", '"', "{x}", "é&<😀>"])
def test_any_path_survives_the_config(name: str, photo_folder: Path, triplets: str, tmp_path: Path) -> None:
    images = photo_folder.rename(tmp_path / name)
    captions = tmp_path / f"{name}.json"
    captions.write_text(json.dumps([{"image": next(images.iterdir()).stem, "caption": "10:30 on a clock"}]))
    loaded = configs.load(str(write_config(tmp_path / "own", str(images), triplets, None, str(captions))), [])
    assert loaded.ingest.galleries["photos"].images == loaded.ingest.galleries["catalogue"].images == str(images)
    assert loaded.ingest.captions["names"].file == str(captions)
    assert loaded.ingest.captions["names"].until is None
    assert loaded.evaluate.images == str(images)


def test_captions_are_checked(photo_folder: Path, triplets: str, tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    for content, message in (
        (None, "captions.json: cannot be read"),
        ("[]", "captions.json: no row can be used"),
        ('[{"image": "ghost", "caption": "x"}]', "1 unknown_image; the first: row 0: image 'ghost' is not in the gallery"),
    ):
        if content is not None:
            captions.write_text(content)
        with pytest.raises(UserError, match=message):
            write_config(tmp_path / "own", str(photo_folder), triplets, None, str(captions))
    assert not (tmp_path / "own").exists()


def test_malformed_rows_do_not_stop_it(
    photo_folder: Path, triplets: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(Path(triplets).read_text())
    Path(triplets).write_text(json.dumps([*rows, {**rows[0], "reference": []}]))
    write_config(tmp_path / "own", str(photo_folder), triplets, None, None)
    assert "1 rows will be rejected: 1 malformed_row" in capfd.readouterr().err.replace("\n", " ")


def test_test_queries_share_no_image_with_what_is_trained_on(photo_folder: Path, triplets: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "own", str(photo_folder), triplets, None, None)
    labelled, queries, held_out = (
        json.loads((path.parent / name).read_text()) for name in ("labelled.json", "queries.json", "held-out.json")
    )
    named = [{row[role] for row in rows for role in ("reference", "target")} for rows in (labelled, queries)]
    assert not named[0] & named[1]
    assert sorted(named[1]) == held_out
    assert len(labelled) + len(queries) == 60
    assert 5 <= len(queries) <= 12
    config = configs.load(str(path), [])
    assert config.evaluate.triplets == str(path.parent / "queries.json")
    assert config.ingest.galleries["photos"].without == str(path.parent / "held-out.json")
    assert "grocery" not in yaml.safe_dump(config.model_dump(mode="json"))


def test_triplets_that_hang_together_need_queries(photo_folder: Path, triplets: str, tmp_path: Path) -> None:
    names = sorted(path.stem for path in photo_folder.iterdir())
    rows = [{"reference": names[i % 24], "target": names[(i + 1) % 24], "captions": ["x"]} for i in range(60)]
    Path(triplets).write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"share their images.*--queries"):
        write_config(tmp_path / "own", str(photo_folder), triplets, None, None)
    (tmp_path / "queries.json").write_text(json.dumps(rows[:3]))
    path = write_config(tmp_path / "own", str(photo_folder), triplets, str(tmp_path / "queries.json"), None)
    assert json.loads((path.parent / "held-out.json").read_text()) == names[:4]


def test_few_labels_are_a_warning(photo_folder: Path, triplets: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(Path(triplets).read_text())[:40]
    Path(triplets).write_text(json.dumps(rows))
    write_config(tmp_path / "own", str(photo_folder), triplets, None, None)
    assert "warning: fewer than 50 labelled triplets" in capfd.readouterr().err.replace("\n", " ")


def test_a_file_in_the_place_of_the_folder(photo_folder: Path, triplets: str) -> None:
    with pytest.raises(UserError, match="already exists"):
        write_config(Path(triplets), str(photo_folder), triplets, None, None)


def test_rejected_and_left_out_files_are_named(
    photo_folder: Path, triplets: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (photo_folder / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (photo_folder / "notes.txt").touch()
    write_config(tmp_path / "own", str(photo_folder), triplets, None, None)
    said = "".join(capfd.readouterr().err.split())
    assert "rejectedgone.jpg:unreadable" in said
    assert "leftout1.txt" in said
