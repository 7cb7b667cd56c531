"""`vdg schema`, `vdg show` and `vdg --version`."""

import json
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.app import config as configs
from tests.cluster.app.test_cli import invoke


@pytest.mark.parametrize("preset", configs.presets())
def test_the_schema_takes_what_show_prints_and_show_prints_a_config_of_its_own(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(invoke("show", preset))
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(invoke("schema")))
    assert configs.load(str(path), []) == configs.load(preset, [])


def test_show_takes_assignments() -> None:
    assert yaml.safe_load(invoke("show", "demo", "--set", "seed=7"))["seed"] == 7


def test_version() -> None:
    assert invoke("--version") == f"vdg {version('visual-delta')}\n"
