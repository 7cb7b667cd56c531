"""The lineage of a small graph of real outputs."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from cluster.app.cli import app
from cluster.artifacts import Stage
from cluster.errors import UserError


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lineage", *map(str, arguments)], catch_exceptions=False)


def test_the_tree_goes_up_and_down(root: Path) -> None:
    shown = invoke("generate:shop", root)
    assert shown.exit_code == 0
    above, _, below = shown.stderr.partition("was used for")
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
    drawing = ElementTree.fromstring(text[text.index("<svg") :])
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f"{space}rect")) == 7
    assert len(drawing.findall(f"{space}path")) == 9


def test_check_names_changed_missing_unknown_and_removed_files(root: Path, stages: dict[str, Stage]) -> None:
    assert invoke("*", root, "--check").exit_code == 0
    folder = {instance: Path(stage.output(str(root)).uri) for instance, stage in stages.items()}
    (folder["train:semi.s1"] / "weights.safetensors").write_bytes(b"other")
    (folder["mine:shop"] / "part-00000.parquet").unlink()
    (folder["generate:shop"] / "part-00001.parquet").write_bytes(b"more")
    shutil.rmtree(folder["ingest:shop"])
    shown = invoke("semi.s1", root, "--check")
    assert shown.exit_code == 1
    said = shown.stderr.replace("\n", " ")
    for line in (
        "weights.safetensors has changed",
        "part-00000.parquet is missing",
        "part-00001.parquet is not",
        "was removed",
    ):
        assert line in said
