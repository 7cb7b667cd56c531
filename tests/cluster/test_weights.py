from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.errors import UserError
from cluster.weights import Weights, sha256_of


def test_exactly_one_source() -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        Weights()
    with pytest.raises(ValidationError, match="exactly one"):
        Weights(hub="a/b", folder="c")


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
