"""Damage to what a finished run left: each trial is a message that names the file, none is silent and none a traceback."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.app import config as configs
from cluster.app import runner
from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.app.labels import Store
from cluster.app.outputs import CONFIG, MODELS, run_configs, users
from cluster.artifacts import MANIFEST, Output
from cluster.driver.lease import LEASE, hold, read
from cluster.errors import UserError
from cluster.verify import verify
from tests.cluster.app.test_cli import RUNNER, app

FLIPS = (0.0, 0.2, 0.5, 0.8, 1.0)
GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "a list": b"[]",
    "null": b"null",
    "half": b'{"name": "ti',
    "foreign": b'{"foreign": 1}',
    "bytes": b"\xff\xfe\x00",
    "depth": b"[" * 100_000,
}


def damages(content: bytes) -> dict[str, bytes | None]:
    """Ways to damage a file; None: it is gone."""
    found: dict[str, bytes | None] = {"gone": None, "cut": content[: len(content) // 2], "emptied": b""}
    for share in FLIPS:
        changed = bytearray(content)
        changed[int(share * (len(content) - 1))] ^= 4
        found[f"a bit at {share}"] = bytes(changed)
    return found


def damaged(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


def test_every_file_of_every_output(finished: Graph) -> None:
    trials: Counter[str] = Counter()
    for stage in finished.stages:
        output = finished.output(stage)
        verify([output])
        for name in output.files():
            path = Path(output.path(name))
            whole = path.read_bytes()
            for kind, content in damages(whole).items() if whole and name != MANIFEST else ():
                damaged(path, content)
                try:
                    with pytest.raises(UserError, match=rf"{name} (is missing|has changed)"):
                        verify([output])
                finally:
                    path.write_bytes(whole)
                trials[f"{stage.kind} {kind}"] += 1
    print(f"{trials.total()} trials in {len(finished.stages)} outputs")
    assert trials.total() > 500


@pytest.mark.parametrize(
    ("instance", "name"),
    [
        ("embed:photo.photos", "part-00000.v0.parquet"),
        ("instruct:vdg", "weights.safetensors"),
        ("train:semi.s0", "weights.safetensors"),
        ("evaluate:all", "gain.json"),
        ("mine:photos", MANIFEST),
    ],
)
def test_a_run_whose_output_was_changed_says_so(finished: Graph, config: str, instance: str, name: str) -> None:
    path = Path(finished.output(finished[instance]).path(name))
    whole = path.read_bytes()
    path.write_bytes(damages(whole)["a bit at 0.5"] or b"")
    try:
        for command in ("run", "report", "evaluate"):
            result = RUNNER.invoke(app, [command, config])
            assert isinstance(result.exception, UserError)
            assert str(path) in str(result.exception)
            assert "the same command then makes it anew" in str(result.exception)
    finally:
        path.write_bytes(whole)


@pytest.fixture
def kept(tmp_path: Path, config: str) -> Path:
    """A root with the folder of a run."""
    folder = tmp_path / "root" / "runs" / "tiny"
    folder.mkdir(parents=True)
    shutil.copy(config, folder / CONFIG)
    (folder / MODELS).write_text('["train:semi.s0-0123456789ab"]')
    return tmp_path / "root"


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_kept_config_that_is_damaged(kept: Path, content: bytes) -> None:
    assert [found.name for found in run_configs(str(kept))] == ["tiny"]
    (kept / "runs" / "tiny" / CONFIG).write_bytes(content)
    uses: list[Callable[[], Any]] = [lambda: list(run_configs(str(kept))), lambda: Run.open(str(kept), "tiny")]
    for use in uses:
        with pytest.raises(UserError, match=r"config\.yaml: (.|\n)*mend it"):
            use()


@pytest.mark.parametrize("content", [*GARBAGE.values(), b'"text"', b"[1]", b'[["x"]]'])
def test_a_list_of_models_that_is_damaged(kept: Path, config: str, content: bytes) -> None:
    (kept / "runs" / "tiny" / MODELS).write_bytes(content)
    graph = Graph(configs.load(config, [f"root={kept}"]))
    if content == b"[]":
        users(graph)
        return
    with pytest.raises(UserError, match=r"models\.json: is damaged"):
        users(graph)


@pytest.mark.parametrize("content", [*GARBAGE.values(), b'{"owner": 1, "host": [], "pid": "x"}'])
def test_a_lease_that_is_none_is_taken(tmp_path: Path, content: bytes) -> None:
    output = Output(str(tmp_path))
    (tmp_path / LEASE).write_bytes(content)
    assert read(output) is None
    with hold(output):
        assert read(output) is not None


def test_a_lease_with_fields_of_another_version_holds(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    with hold(output):
        output.write_json(LEASE, {**output.read_json(LEASE), "zone": "a"})
        lease = read(output)
        assert lease is not None
        assert lease.live


def test_labels_that_are_none(finished: Graph) -> None:
    store = Store(Run(finished))
    judged = {"triplet_id": 1, "reference_id": 2, "target_id": 3, "text": "in green", "verdict": "right", "reason": "uniform"}
    store.add({"label_id": "0" * 32, **judged}, "me", "0" * 12)
    whole = store.folder.read_bytes(f"{'0' * 32}.json")
    for content in (*GARBAGE.values(), whole.replace(b'"right"', b'"fine"'), whole.replace(b": 1,", b': "x",')):
        store.folder.write_bytes(f"{'1' * 32}.json", content)
        with pytest.raises(UserError, match=r"1\.json: is no label .*; mend it, or remove this file"):
            list(Store(Run(finished)))
    store.folder.location[0].delete_dir(store.folder.location[1])


def test_metrics_of_a_run_are_written_again(finished: Graph, config: str) -> None:
    path = Path(runner.run_folder(finished.config).path("metrics.json"))
    whole = path.read_bytes()
    for content in GARBAGE.values():
        path.write_bytes(content)
        assert RUNNER.invoke(app, ["report", config]).exit_code == 0
        assert path.read_bytes() == whole
