"""`vdg schema`, `vdg show` and `vdg --version`."""

import json
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.app import config as configs
from cluster.config import in_folder
from tests.cluster.app.test_cli import invoke


@pytest.mark.parametrize("preset", configs.presets())
def test_the_schema_takes_what_show_prints_and_show_prints_a_config_of_its_own(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    path.write_text(invoke("show", preset))
    jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(invoke("schema")))
    shown, named = (configs.load(config, []).model_dump(mode="json") for config in (str(path), preset))
    assert shown == in_folder(configs.RunConfig, named, Path.cwd())


@pytest.mark.parametrize("file", configs.PRESETS.rglob("*.yaml"), ids=lambda file: file.stem)
def test_the_schema_takes_every_file_as_it_is_written(file: Path) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(invoke("schema")))


def test_the_schema_finds_a_misspelt_field() -> None:
    with pytest.raises(jsonschema.ValidationError, match="batchsize"):
        jsonschema.validate({"extends": "demo", "embed": {"batchsize": 3}}, json.loads(invoke("schema")))


def test_show_takes_assignments() -> None:
    assert yaml.safe_load(invoke("show", "demo", "--set", "seed=7"))["seed"] == 7


def test_version() -> None:
    assert invoke("--version") == f"vdg {version('visual-delta')}\n"
