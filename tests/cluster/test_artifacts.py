import hashlib
import os
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.artifacts import MANIFEST, Output, fingerprint
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.provenance import record_environment
from cluster.stage import Stage
from tests.stages import simple

SCHEMA = pa.schema([("n", pa.int64())])


def numbers(output: Output, monitor: Monitor) -> None:
    output.write_table("part-00000.parquet", pa.table({"n": [1, 2, 3]}), SCHEMA)


def stage(**changes: object) -> Stage:
    fields: dict = {"instance": "mine:a", "version": 1, "settings": {"k": 1}, "work": numbers} | changes
    return simple(**fields)


def test_digest_follows_from_settings_version_parents_and_sources(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    source.write_text("[]")
    base = stage(sources={"f": str(source)})
    assert base.digest == stage(sources={"f": str(source)}).digest
    variants = [
        stage(sources={"f": str(source)}, settings={"k": 2}),
        stage(sources={"f": str(source)}, version=2),
        stage(sources={"f": str(source)}, parents={"p": stage()}),
    ]
    source.write_text("[1]")
    variants.append(stage(sources={"f": str(source)}))
    assert len({base.digest, *(variant.digest for variant in variants)}) == 5


def test_digest_does_not_depend_on_where_a_source_lies(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x.jpg").write_bytes(b"x")
        os.utime(folder / "x.jpg", (1, 1))
        digests.add(stage(sources={"images": str(folder)}).digest)
    assert len(digests) == 1


def test_a_finished_stage_is_not_done_again(tmp_path: Path, monitor: Monitor) -> None:
    first = stage().run(str(tmp_path), monitor)

    def fail(output: Output, monitor: Monitor) -> None:
        raise AssertionError("done twice")

    assert stage(work=fail).run(str(tmp_path), monitor) == first
    assert first["rows"] == 3
    content = stage().output(str(tmp_path)).read_bytes("part-00000.parquet")
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    assert first["parts"] == {
        "part-00000.parquet": {
            "rows": 3,
            "bytes": len(content),
            "footer": hashlib.sha256(footer).hexdigest(),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    }


def test_a_manifest_tells_what_the_models_ran_on(tmp_path: Path, monitor: Monitor) -> None:
    def modelled(output: Output, monitor: Monitor) -> None:
        numbers(output, monitor)
        for precision in ("fp32", "fp32", "bf16"):  # three processes of two kinds
            record_environment(output, precision)

    manifest = stage(work=modelled).run(str(tmp_path), monitor)
    assert sorted(found["precision"] for found in manifest["environment"]) == ["bf16", "fp32"]
    assert all(found["torch"] == version("torch") for found in manifest["environment"])
    assert manifest["digest"] == stage().digest


def test_an_interrupted_stage_has_no_manifest(tmp_path: Path, monitor: Monitor) -> None:
    def interrupted(output: Output, monitor: Monitor) -> None:
        numbers(output, monitor)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(work=interrupted).run(str(tmp_path), monitor)
    output = stage().output(str(tmp_path))
    assert output.manifest() is None
    assert output.parts() == ["part-00000.parquet"]


def test_rejects_are_counted_and_too_many_fail(tmp_path: Path, monitor: Monitor) -> None:
    def rejecting(output: Output, monitor: Monitor) -> None:
        numbers(output, monitor)
        output.write_rejects("part-00000.parquet", [{"key": "bad", "stage": "mine", "reason": "empty", "detail": "0 bytes"}])

    with pytest.raises(UserError, match=r"1 of 4 rows were rejected.*bad: empty"):
        stage(work=rejecting, max_reject_fraction=0.2).run(str(tmp_path), monitor)
    manifest = stage(work=rejecting, max_reject_fraction=0.25).run(str(tmp_path), monitor)
    assert manifest["rejects"] == {"empty": 1}


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path, monitor: Monitor) -> None:
    folder = Path(stage().output(str(tmp_path)).uri) / "scores"
    folder.mkdir(parents=True)
    (folder / f".part-00000.parquet.{'0' * 32}").write_bytes(b"half")
    (folder / ".lease").write_bytes(b"{}")
    stage().run(str(tmp_path), monitor)
    assert [path.name for path in folder.iterdir()] == [".lease"]


def test_files_being_written_are_not_listed(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    (tmp_path / ".part-00000.parquet.abc").write_bytes(b"half")
    assert output.parts() == []
    output.write_bytes("sub/x", b"whole")
    assert output.names("sub") == ["x"]
    assert output.files() == ["sub/x"]


def test_a_relative_output_is_the_same_folder_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = Output("outputs/x")
    output.write_bytes("a", b"1")
    monkeypatch.chdir("/")
    assert output.read_bytes("a") == b"1"


def test_wrong_schema_is_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    with pytest.raises(TypeError, match="expected"):
        output.write_table("part-00000.parquet", pa.table({"m": [1.0]}), SCHEMA)


def test_outputs_work_on_a_filesystem_uri(tmp_path: Path, monitor: Monitor) -> None:
    root = f"file://{tmp_path}/root"
    stage().run(root, monitor)
    assert stage().output(root).exists(MANIFEST)
    assert stage().output(root).read_parts(SCHEMA)["n"].to_pylist() == [1, 2, 3]


def test_fingerprint_of_a_missing_source(tmp_path: Path) -> None:
    assert fingerprint(str(tmp_path / "none")) is None
    missing = stage(sources={"ingest.images": str(tmp_path / "none")})
    assert missing.missing() == {"ingest.images": f"{tmp_path / 'none'} does not exist; correct the path or bring the files"}
