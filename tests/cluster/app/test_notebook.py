"""The notebook runs as it stands, on the run of the tests' tiny models."""

import json
import re
from pathlib import Path

import matplotlib
import pytest

from cluster.app.graph import Graph
from cluster.monitor import Monitor

NOTEBOOK = Path(__file__).parents[3] / "docs" / "search.ipynb"


def test_every_cell_runs_in_order(
    finished: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished.index is not None
    finished.index.run(finished.root, Monitor())
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {"ROOT": finished.root, "NAME": finished.config.name}
        elif cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}", "exec"), names)
    shown = capsys.readouterr().out
    assert "semi.s0 [" in shown
    assert re.search(r"^[1-9]\d* pseudo triplets$", shown, re.MULTILINE)
    assert (tmp_path / "exported" / "tower.json").is_file()
