"""The lineage of a small graph of real outputs."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from cluster.app import config as configs
from cluster.app.cli import app
from cluster.app.graph import Graph
from cluster.driver.mlflow_store import sqlite_uri
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.stage import Stage
from tests.cluster.app.commands.conftest import table


def invoke(name: object, place: object, *options: object) -> Result:
    return CliRunner().invoke(app, ["lineage", *map(str, (place, name, *options))], catch_exceptions=False)


def test_the_tree_goes_up_and_down(root: Path) -> None:
    shown = invoke("generate:shop", root)
    assert shown.exit_code == 0
    above, _, below = shown.stdout.partition("was used for")
    for line in ("pairs: mine:shop-", "vdg: instruct:vdg-", "triplets: ingest:labelled-", "gallery: ingest:shop-"):
        assert line in above
    assert "pseudo_triplets: train:semi.s1-" in below


@pytest.mark.parametrize("by", ["model", "instance", "digest", "name", "pattern"])
def test_an_output_is_found_by(by: str, root: Path, stages: dict[str, Stage]) -> None:
    digest = stages["train:semi.s1"].digest
    names = {
        "model": "semi.s1",
        "instance": "train:semi.s1",
        "digest": digest,
        "name": f"train:semi.s1-{digest}",
        "pattern": "semi.*",
    }
    found = json.loads(invoke(names[by], root, "--json").stdout)
    assert [one["name"] for one in found] == [f"train:semi.s1-{digest}"]
    outputs = found[0]["outputs"]
    assert len(outputs) == 7
    generated = f"generate:shop-{stages['generate:shop'].digest}"
    assert outputs[f"train:semi.s1-{digest}"]["parents"]["pseudo_triplets"] == generated
    assert outputs[generated]["children"] == [f"train:semi.s1-{digest}"]


def test_what_is_not_there_is_named(root: Path) -> None:
    with pytest.raises(UserError, match=r"other\.s1: no finished output"):
        invoke("other.s1", root)
    with pytest.raises(UserError, match=r"root without mlflow\.db"):
        invoke("0" * 32, root)


def test_the_page_draws_every_output_and_edge(root: Path, tmp_path: Path) -> None:
    invoke("semi.s1", root, "--html", tmp_path / "lineage.html")
    text = (tmp_path / "lineage.html").read_text()
    drawing = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f"{space}a/{space}rect")) == 7
    assert len(drawing.findall(f"{space}path")) == 9
    assert text.count("<tr id=") == 7


def test_check_names_changed_missing_unknown_and_removed_files(root: Path, stages: dict[str, Stage]) -> None:
    assert invoke("*", root, "--check").exit_code == 0
    folder = {instance: Path(stage.output(str(root)).uri) for instance, stage in stages.items()}
    (folder["train:semi.s1"] / "weights.safetensors").write_bytes(b"other")
    (folder["mine:shop"] / "part-00000.parquet").unlink()
    (folder["generate:shop"] / "part-00001.parquet").write_bytes(b"more")
    (folder["generate:shop"] / "scores" / "part-00000.parquet").write_bytes(b"other")
    shutil.rmtree(folder["ingest:shop"])
    shown = invoke("semi.s1", root, "--check")
    assert shown.exit_code == 1
    said = shown.stderr.replace("\n", " ")
    for line in (
        "weights.safetensors has changed",
        "scores/part-00000.parquet has changed",
        "part-00000.parquet is missing",
        "part-00001.parquet is not",
        "was removed",
    ):
        assert line in said


def test_export_writes_the_model_and_its_card(root: Path, stages: dict[str, Stage], tmp_path: Path) -> None:
    def run(model: str) -> Result:
        return CliRunner().invoke(app, ["export", str(root), model, str(tmp_path / "out")], catch_exceptions=False)

    assert "needs this package" in run("semi.s1").stderr.replace("\n", " ")
    card = (tmp_path / "out" / "README.md").read_text()
    for instance in ("train:semi.s1", "ingest:shop", "generate:shop", "instruct:vdg"):
        assert stages[instance].digest in card
    assert "loss: 1" in card  # of the best step, not the last
    assert (tmp_path / "out" / "text_tower.safetensors").exists()
    with pytest.raises(UserError, match="is not an empty folder"):
        run("semi.s1")
    with pytest.raises(UserError, match="is no model to export"):
        run("mine:shop")
    with pytest.raises(UserError, match="expected one finished output"):
        run("*")
    (Path(stages["train:semi.s1"].output(str(root)).uri) / "cir.json").write_text("{}")
    with pytest.raises(UserError, match=r"cir\.json has changed"):
        run("semi.s1")


def test_a_push_lists_what_it_would_send(root: Path) -> None:
    def run(repository: str) -> Result:
        arguments = ["push", str(root), "semi.s1", repository, "--dry-run"]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    shown = run("someone/model").stdout
    assert [line.split()[0] for line in shown.splitlines()] == [
        "README.md",
        "cir.json",
        "text_tower.safetensors",
        "weights.safetensors",
    ]
    with pytest.raises(UserError, match="give owner/name"):
        run("no such/name")


def test_an_mlflow_run_names_its_output(root: Path, stages: dict[str, Stage], empty_store: Path) -> None:
    from cluster.driver.tracking import Tracker

    tracker = Tracker(sqlite_uri(Path(shutil.copy(empty_store, root))), "vdg", "run", {})
    assert tracker.complete(stages["mine:shop"], str(root))
    run_id = tracker.find("tags.stage = 'mine'")
    assert "mine:shop-" in invoke(run_id, root).stdout
    with pytest.raises(UserError, match="is not the run of a stage"):
        invoke(tracker.parent, root)


def test_track_writes_what_is_missing_once(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assignment = f"root={tmp_path}"

    def track() -> str:
        return CliRunner().invoke(app, ["track", "grocery", "--set", assignment], catch_exceptions=False).stderr

    with pytest.raises(UserError, match="no stage is finished"):
        track()
    graph = Graph(configs.load("grocery", [assignment]))
    for stage in graph.stages[:2]:
        monkeypatch.setattr(type(stage), "work", lambda self, output, run: table(output, run.monitor))
        stage.run(graph.root, Monitor())
    assert track().startswith("2 of 2 finished stages")
    assert track().startswith("0 of 2 finished stages")
