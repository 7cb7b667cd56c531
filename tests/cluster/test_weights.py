import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from cluster.config import Section, content_of
from cluster.errors import UserError
from cluster.weights import Weights, sha256_of


def test_exactly_one_source() -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        Weights()
    with pytest.raises(ValidationError, match="exactly one"):
        Weights(hub="a/b", folder="c")
    with pytest.raises(ValidationError, match="exactly one"):
        Weights(package="")


@pytest.mark.parametrize("where", [{"hub": "a/b"}, {"folder": "c"}, {"package": "d"}])
def test_a_hash_is_that_of_a_local_file(where: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="sha256"):
        Weights(**where, sha256="00")


@pytest.mark.parametrize("name", ["no_such_package.weights", ".", "a b", "..x"])
def test_what_is_no_package_is_missing(name: str) -> None:
    with pytest.raises(UserError, match=f"Python package '{name}' is not installed"):
        Weights(package=name).location()


def test_folder_file_and_hash(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"weights")
    right = sha256_of(tmp_path / "w.bin")
    assert Weights(folder=str(tmp_path), file="w.bin", sha256=right).location() == str(tmp_path / "w.bin")
    with pytest.raises(UserError, match="expected 00"):
        Weights(folder=str(tmp_path), file="w.bin", sha256="00").location()
    with pytest.raises(UserError, match="does not exist"):
        Weights(folder=str(tmp_path), file="none").location()


def test_package() -> None:
    assert Path(Weights(package="yaml", file="loader.py").location()).name == "loader.py"
    with pytest.raises(UserError, match="not installed"):
        Weights(package="no_such_package_here").location()


def test_hub_weights_are_in_the_cache_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = Weights(hub="someone/something", revision="a" * 40)
    with pytest.raises(UserError, match=f"weights: 'someone/something' at revision {'a' * 40} is not in the local cache"):
        weights.check()
    snapshot = tmp_path / "models--someone--something" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not in the local cache"):
        weights.check()
    save_file({"weight": np.zeros(1, np.float32)}, snapshot / "model.safetensors")
    weights.check()


def test_identity_says_what_the_weights_are_and_never_where(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.bin").write_bytes(b"weights")
        os.utime(tmp_path / name / "w.bin", (1, 1))
    here, there = (Weights(folder=str(tmp_path / name)) for name in ("here", "there"))
    assert here.identity() == there.identity()
    (tmp_path / "there" / "w.bin").write_bytes(b"others!")
    assert here.identity() != there.identity()
    assert Weights(folder=str(tmp_path / "there"), file="w.bin", sha256="00").identity() == {"sha256": "00"}
    assert Weights(hub="a/b", revision="c").identity() != Weights(hub="a/b", revision="d").identity()
    assert Weights(package="yaml", file="loader.py").identity() == {
        "package": "yaml",
        "version": version("pyyaml"),
        "file": "loader.py",
    }


class Tower(Section):
    size: int
    weights: Weights | None


class Towers(Section):
    towers: dict[str, Tower]


def test_a_digest_takes_identities_and_a_saved_config_the_paths(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"weights")
    weights = Weights(folder=str(tmp_path))
    towers = Towers(towers={"a": Tower(size=1, weights=weights), "b": Tower(size=2, weights=None)})
    assert content_of(towers) == {
        "towers": {"a": {"size": 1, "weights": json.loads(json.dumps(weights.identity()))}, "b": {"size": 2, "weights": None}}
    }
    assert str(tmp_path) not in json.dumps(content_of(towers))
    assert Towers.model_validate(towers.model_dump(mode="json")) == towers
