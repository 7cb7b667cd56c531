"""Damage to a finished output is a message that names it before anybody works on it; a part that does not open is remade."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save

from cluster import verify as verifying
from cluster.artifacts import MANIFEST, Output
from cluster.errors import UserError
from cluster.manifest import parse, sealed
from cluster.monitor import Monitor
from cluster.stage import Stage
from cluster.verify import differences, verify
from tests.stages import simple

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])
SMALL, LARGE = "part-00000.parquet", "part-00001.parquet"
ROWS = {SMALL: 30, LARGE: 3000}


@cache
def table(name: str) -> pa.Table:
    rng = np.random.default_rng(ROWS[name])
    return pa.table({"n": rng.integers(2**60, size=ROWS[name]), "text": [rng.bytes(20).hex() for _ in range(ROWS[name])]})


def write(output: Output, monitor: Monitor) -> None:
    """Every kind of file that a stage writes."""
    for name in ROWS:
        if name not in output.parts():
            output.write_table(name, table(name), SCHEMA)
    output.write_table(f"scores/{SMALL}", table(SMALL), SCHEMA)
    output.write_rejects(SMALL, [{"key": "bad", "stage": "mine", "reason": "empty", "detail": "0 bytes"}])
    output.write_bytes("weights.safetensors", save({"w": np.arange(5000, dtype=np.float32)}))
    output.write_json("info.json", {"tokens": 1, "dim": 3})
    output.write_bytes("metrics.jsonl", b'{"step": 1}\n')
    output.write_bytes("packs/part-00000.arrow", b"pack")


def made() -> Stage:
    return simple("mine:a", work=write, max_reject_fraction=0.1)


def child(work: Callable[[Output, Monitor], None]) -> Stage:
    return simple("train:b", work=work, parents={"a": made()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the finished parent."""
    root = tmp_path_factory.mktemp("finished")
    made().run(str(root), Monitor())
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; its second part counts as large."""
    monkeypatch.setattr(verifying, "HASHED", 20_000)
    return shutil.copytree(finished, tmp_path / "root")


def without_a_row(file: Path) -> None:
    pq.write_table(pq.read_table(file).slice(1), file)


def reordered(file: Path) -> None:
    rows = pq.read_table(file)
    pq.write_table(rows.take(np.arange(len(rows))[::-1]), file, compression="zstd", write_page_checksum=True)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(at: float) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(at * (len(content) - 1))] ^= 4
        file.write_bytes(content)

    return flip


FILES = [SMALL, LARGE, f"scores/{SMALL}", f"rejects/{SMALL}", "weights.safetensors", "info.json", "metrics.jsonl"]
FILES += ["packs/part-00000.arrow"]
ANY = {"cut": cut, "emptied": emptied, "gone": Path.unlink, "first byte": flipped(0), "last byte": flipped(1)}
TABLES = {"a row taken out": without_a_row, "reordered": reordered}
DAMAGES = [(name, kind) for name in FILES for kind in (*ANY, *(TABLES if name in (SMALL, LARGE, f"scores/{SMALL}") else ()))]
DAMAGES.remove((LARGE, "first byte"))  # of the mark that a Parquet file begins with, which nobody reads


@pytest.mark.parametrize(("name", "kind"), DAMAGES)
def test_a_damaged_parent_stops_a_stage_before_its_work(root: Path, name: str, kind: str) -> None:
    ({**ANY, **TABLES}[kind])(Path(made().output(str(root)).path(name)))

    def never(output: Output, monitor: Monitor) -> None:
        raise AssertionError("worked on a damaged parent")

    with pytest.raises(UserError) as found:
        child(never).run(str(root), Monitor())
    said = str(found.value)
    assert f"{name} {'is missing' if kind == 'gone' else 'has changed'}" in said
    assert "bring back what was there, or remove" in said
    assert kind != "a row taken out" or "/" in name or f"it has {ROWS[name] - 1} rows, its manifest says {ROWS[name]}" in said


def test_a_byte_in_the_middle_of_a_large_part_is_found_when_it_is_read(root: Path) -> None:
    output = made().output(str(root))
    flipped(0.5)(Path(output.path(LARGE)))
    verify([output])
    with pytest.raises(UserError, match=rf"{LARGE}: is damaged \(.*CRC.*remove"):
        child(lambda _, __: output.read_parts(SCHEMA) and None).run(str(root), Monitor())


def test_a_table_that_the_manifest_does_not_name(root: Path) -> None:
    output = made().output(str(root))
    for name in ("part-00002.parquet", "scores/part-00001.parquet"):
        shutil.copy(output.path(SMALL), output.path(name))
    Path(output.path("notes.txt")).write_text("harmless")
    manifest = output.manifest()
    assert manifest is not None
    assert sorted(differences(output, manifest)) == [
        "part-00002.parquet is not in the manifest",
        "scores/part-00001.parquet is not in the manifest",
    ]


def test_what_was_compared_is_compared_again_only_when_it_has_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, compared = made().output(str(root)), []

    def counted(*arguments: Any) -> list[str]:
        compared.append(arguments)
        return differences(*arguments)

    monkeypatch.setattr(verifying, "differences", counted)
    for _ in range(3):
        verify([output])
    assert len(compared) == 1
    Path(output.path("info.json")).touch()
    verify([output])
    assert len(compared) == 2


def test_every_bit_of_a_manifest_is_as_it_was_written_or_it_is_refused(tmp_path: Path) -> None:
    stage = simple("mine:a", settings={"k": 1.5}, work=lambda output, _: output.write_json("info.json", {"tokens": 1}))
    stage.run(str(tmp_path), Monitor())
    output = stage.output(str(tmp_path))
    path = Path(output.path(MANIFEST))
    content, whole = path.read_bytes(), output.manifest()
    for place in range(len(content)):
        for bit in (0, 2, 5, 7):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            found: Any = None
            with suppress(UserError):
                found = output.manifest()
            assert found in (None, whole)  # the same with another kind of white space


MANIFESTS: dict[str, Any] = {
    "nothing": b"",
    "half": b'{"instance": "mine:a", "di',
    "a list": b"[]",
    "an object": b"{}",
    "null": b"null",
    "text": b'"x"',
    "bytes": b"\xff\xfe",
    "depth": b"[" * 100_000,
    "digits": b"9" * 5000,
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none(root: Path, content: bytes) -> None:
    output = made().output(str(root))
    Path(output.path(MANIFEST)).write_bytes(content)
    for use in (lambda: made().run(str(root), Monitor()), lambda: child(write).run(str(root), Monitor())):
        with pytest.raises(UserError, match=r"manifest\.json: is damaged .* remove .*the same command then makes it anew"):
            use()


CHANGES = {
    "foreign": {"foreign": 1},
    "digest": {"digest": "<script>alert(1)</script>"},
    "instance": {"instance": "../../x:y"},
    "of another": {"instance": "mine:b"},
    "rows": {"rows": -1},
    "parents": {"parents": {"a": {"instance": "mine:a", "digest": "<b>"}}},
    "files": {"files": []},
    "seal": {"rows": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("resealed", [False, True])
def test_a_manifest_that_somebody_has_changed(root: Path, change: dict[str, Any], resealed: bool) -> None:
    output = made().output(str(root))
    content = {**output.read_json(MANIFEST), **change}
    if resealed and "rows" in change and change["rows"] >= 0:
        return  # as good as written
    output.write_json(MANIFEST, sealed(content) if resealed else content)  # type: ignore[typeddict-item]
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        output.manifest()


def test_a_manifest_of_an_earlier_version_is_read(root: Path) -> None:
    output = made().output(str(root))
    content = output.read_json(MANIFEST)
    for name in ("seal", "files", "startup_seconds", "environment", "code"):
        content.pop(name)
    for part in content["parts"].values():
        del part["bytes"], part["footer"]
    output.write_json(MANIFEST, content)
    verify([output])
    reordered(Path(output.path(LARGE)))
    with pytest.raises(UserError, match=f"{LARGE} has changed"):
        verify([output])


def test_a_damaged_manifest_of_an_earlier_state_is_no_earlier_state(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.write_text("one")

    def stage() -> Stage:
        parent = simple("ingest:g", sources={"images": str(source)})
        return simple("embed:t.g", work=write, parents={"gallery": parent}, max_reject_fraction=0.1)

    first = stage()
    first.run(str(tmp_path), Monitor())
    source.write_text("two images")
    assert stage().earlier(str(tmp_path)) is not None
    without_a_row(Path(first.output(str(tmp_path)).path(SMALL)))
    assert stage().earlier(str(tmp_path)) is None
    first.output(str(tmp_path)).write_bytes(MANIFEST, b"[]")
    assert stage().earlier(str(tmp_path)) is None


@pytest.mark.parametrize("name", [SMALL, LARGE, f"scores/{SMALL}", f"rejects/{SMALL}"])
@pytest.mark.parametrize("damage", [cut, emptied, flipped(1)], ids=["cut", "emptied", "last byte"])
def test_an_unfinished_stage_remakes_a_part_that_does_not_open(root: Path, name: str, damage: Callable[[Path], None]) -> None:
    output = made().output(str(root))
    whole = output.manifest()
    assert whole is not None
    Path(output.path(MANIFEST)).unlink()
    damage(Path(output.path(name)))
    again = made().run(str(root), Monitor())
    assert (again["rows"], again["rejects"], again["parts"], again["files"]) == (
        whole["rows"],
        whole["rejects"],
        whole["parts"],
        whole["files"],
    )


def test_a_manifest_says_sizes_and_a_seal(root: Path) -> None:
    output = made().output(str(root))
    manifest = json.loads(output.read_bytes(MANIFEST))
    assert {name: part["bytes"] for name, part in manifest["parts"].items()} == {
        name: Path(output.path(name)).stat().st_size for name in ROWS
    }
    assert Path(output.path(LARGE)).stat().st_size > verifying.HASHED
    assert parse(manifest)["rows"] == sum(ROWS.values())


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_no_manifest(root: Path, put: Callable[[Path], None]) -> None:
    path = Path(made().output(str(root)).path(MANIFEST))
    path.unlink()
    put(path)
    with pytest.raises(UserError, match=r"manifest\.json: is damaged \(it is no file\)"):
        made().output(str(root)).manifest()


def test_half_a_manifest_of_a_killed_driver_is_none(root: Path) -> None:
    output = made().output(str(root))
    content = output.read_bytes(MANIFEST)
    Path(output.path(MANIFEST)).unlink()
    Path(output.path(f".{MANIFEST}.{'0' * 32}")).write_bytes(content[:50])
    assert output.manifest() is None
    assert made().run(str(root), Monitor())["rows"] == sum(ROWS.values())
    assert not list(Path(output.uri).glob(".*"))
