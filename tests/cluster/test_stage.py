"""What a stage finds of earlier runs, and what it says of its own."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.artifacts import MANIFEST, REUSED, Output
from cluster.monitor import Monitor
from cluster.stage import Stage
from tests.stages import simple


def stage(source: Path, settings: dict[str, Any], instance: str = "embed:t.g") -> Stage:
    def work(output: Output, monitor: Monitor) -> None:
        output.write_json(REUSED, {"t.g-0": 3})

    parent = simple("ingest:g", 1, {}, work, sources={"images": str(source)})
    return simple(instance, 1, settings, work, {"gallery": parent})


def test_only_the_same_instance_and_settings_of_other_parents(tmp_path: Path) -> None:
    source, root = tmp_path / "images", str(tmp_path / "root")
    source.write_text("one")
    first = stage(source, {"crop": (1, 2)})
    assert first.earlier(root) is None
    manifest = first.run(root, Monitor())
    assert manifest["reused"] == {"t.g-0": 3}
    assert first.earlier(root) is None  # its own
    source.write_text("two images")
    second = stage(source, {"crop": (1, 2)})
    assert second.digest != first.digest
    found = second.earlier(root)
    assert found is not None
    assert found[0] == first.output(root)
    assert found[1]["parents"]["gallery"]["digest"] == first.parents["gallery"].digest
    assert stage(source, {"crop": (1, 3)}).earlier(root) is None
    assert stage(source, {"crop": (1, 2)}, "embed:t.other").earlier(root) is None


def test_the_newest_is_taken_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    source, root = tmp_path / "images", str(tmp_path / "root")
    outputs = []
    for index, content in enumerate(("a", "bb", "ccc")):
        source.write_text(content)
        made = stage(source, {})
        made.run(root, Monitor())
        outputs.append(made.output(root))
        os.utime(made.output(root).path(MANIFEST), (index, index))
    Path(outputs[2].path(MANIFEST)).unlink()
    source.write_text("dddd")
    found = stage(source, {}).earlier(root)
    assert found is not None
    assert found[0] == outputs[1]


def test_a_stage_has_started_when_its_first_unit_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=7.0)
    monkeypatch.setattr("cluster.stage.time", SimpleNamespace(monotonic=lambda: clock.now))

    def work(output: Output, monitor: Monitor) -> None:
        clock.now += 0.5
        monitor.advance(1, 0.4)
        clock.now += 0.5
        monitor.advance(1, 0.4)

    manifest = simple("embed:t.g", 1, {}, work).run(str(tmp_path), Monitor())
    assert (manifest["startup_seconds"], manifest["seconds"]) == (0.1, 1.0)
