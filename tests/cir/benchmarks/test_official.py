"""Images of official benchmarks, and what mining must leave out."""

import hashlib
from pathlib import Path

import pytest

from cir.benchmarks.official import Annotations, IngestExcluded, IngestExcludedNames, IngestImages
from cir.config import Part
from cluster.artifacts import Output
from cluster.config import DecodeResources
from cluster.errors import UserError
from cluster.stage import Limit, Source, Stage
from mining import tables
from mining.exclude import LISTING
from mining.gallery import read_images
from tests.cir.benchmarks import official
from tests.stages import running

Photos = list[tuple[str, bytes]]


def annotations(benchmark: str, part: Part | None, train: bool = False) -> Annotations:
    return Annotations("evaluate.annotations", official.annotations(benchmark), benchmark=benchmark, part=part, train=train)


def _stage(kind: type, benchmark: str, part: Part | None, images: str) -> Stage:
    return kind(
        name="evaluate" if part else f"excluded-{benchmark}",
        images=Source("evaluate.images", images, kept=True),
        annotations=annotations(benchmark, part),
        shard_rows=1500,
        shard_bytes=2**28,
        max_pixels=10**8,
        max_reject_fraction=Limit(0),
        resources=DecodeResources(),
    )


def _images(folder: Path, names: list[str], photos: Photos) -> str:
    """A folder of real photos under the names of a split."""
    for place, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(photos[place % 8][1])
    return str(folder)


def test_exactly_the_images_of_the_split_are_taken_in_place(tmp_path: Path, photos: Photos, ray_session: None) -> None:
    known = annotations("cirr", "val").names()
    images = _images(tmp_path / "img_raw", [*map(str, known.values()), "dev/dev-0-9-img9.png"], photos)
    output = Output(str(tmp_path / "gallery"))
    _stage(IngestImages, "cirr", "val", images).work(output, running())
    table = output.read_parts(tables.GALLERY)
    assert sorted(table["key"].to_pylist()) == sorted(known)
    assert table["image"].null_count == len(known)
    benchmark = annotations("cirr", "val").load()
    assert set(table["image_id"].to_pylist()) == set(benchmark.names)
    assert not len(output.rejects())


def test_absent_images_are_counted_and_the_first_is_named(tmp_path: Path, photos: Photos) -> None:
    known = annotations("cirr", "val").names()
    images = _images(tmp_path / "img_raw", [str(path) for path in known.values()][1:4], photos)
    message = r"2,294 of the benchmark's 2,297 images are not in .*img_raw, the first: .*img_raw/dev/dev-244-0-img0\.png"
    with pytest.raises(UserError, match=message):
        _stage(IngestImages, "cirr", "val", images).work(Output(str(tmp_path / "g")), running())


@pytest.mark.parametrize(
    ("name", "train", "count", "prefixes"),
    [
        ("cirr", False, 2297 + 2315, ["dev-", "test1-"]),
        ("cirr", True, 16_939 + 2297 + 2315, ["dev-", "test1-"]),
        ("fashioniq", False, 15_415 + 15_417 - 266, []),
    ],
)
def test_names_of_a_benchmark_are_excluded(tmp_path: Path, name: str, train: bool, count: int, prefixes: list[str]) -> None:
    output = Output(str(tmp_path))
    excluded = annotations(name, None, train)
    IngestExcludedNames(name="excluded-x", annotations=excluded, max_reject_fraction=Limit(0)).work(output, running())
    rows = output.read_table(LISTING, tables.EXCLUDED).to_pylist()
    assert [row["name"] for row in rows if row["is_prefix"]] == prefixes
    names = {row["name"] for row in rows if not row["is_prefix"]}
    assert len(names) == count
    assert names >= set(annotations(name, "test").names())
    assert not any(row["sha256"] for row in rows)
    assert len(output.read_parts(tables.GALLERY)) == 0
    assert all(Path(file).is_file() for file in excluded.files)


def test_images_that_are_there_are_excluded_by_content_too(tmp_path: Path, photos: Photos, ray_session: None) -> None:
    paths = ["dev/dev-244-0-img0.png", "test1/test1-147-1-img1.png"]
    images, output = _images(tmp_path / "img_raw", paths, photos), Output(str(tmp_path / "output"))
    _stage(IngestExcluded, "cirr", None, images).work(output, running())
    rows = output.read_table(LISTING, tables.EXCLUDED).to_pylist()
    hashes = {row["name"]: row["sha256"] for row in rows if row["sha256"]}
    assert hashes == {Path(p).stem: hashlib.sha256(photos[i][1]).hexdigest() for i, p in enumerate(paths)}
    ids = output.read_parts(tables.GALLERY, ["image_id"])["image_id"].to_pylist()
    assert sorted(read_images([output], ids).values()) == sorted(photos[i][1] for i in range(2))
    assert len(output.rejects()) == 2297 + 2315 - 2
