"""Files of weights that are cut, pointers, or half of a model, told by their headers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.weight_files import damage
from cluster.weights import Weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548118077\n"
STATE = {"a": torch.arange(10_000.0), "b": torch.ones(3)}


def _legacy(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("suffix", "save"), [(".safetensors", save_file), (".pth", torch.save), (".pt", _legacy), (".bin", torch.save)]
)
@pytest.mark.parametrize("kept", [1.0, 0.9, 0.01, 0.0])
def test_a_cut_file_is_told_by_its_header(tmp_path: Path, suffix: str, save: Callable[..., None], kept: float) -> None:
    path = tmp_path / f"w{suffix}"
    save(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    found = damage(path)
    assert found is None if kept == 1 else found is not None and found.endswith("; bring it again")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".gguf", ".onnx"])
def test_a_pointer_is_told_from_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_text(POINTER)
    assert "is a git-lfs pointer, not the file; `git lfs pull`" in (damage(path) or "")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, b"<html>404</html>"])
def test_what_is_no_gguf_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.gguf").write_bytes(content)
    assert "bring it again" in (damage(tmp_path / "w.gguf") or "")


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"a": Hostile()}, tmp_path / "w.pth")
    assert "w.pth is cut or no .pth file" in (damage(tmp_path / "w.pth") or "")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def model(tmp_path: Path, language_model: Weights) -> Path:
    """A folder as transformers saves one, with what is left over of a training and of other libraries."""
    folder = tmp_path / "model"
    shutil.copytree(language_model.location(), folder)
    torch.save(Path, folder / "training_args.bin")
    (folder / "pytorch_model.bin").write_text(POINTER)  # never read beside safetensors
    (folder / "tf_model.h5").write_text(POINTER)
    (folder / "eval.json").write_text("[]")
    return folder


def test_a_whole_folder_has_no_damage(model: Path) -> None:
    assert damage(model) is None


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("model.safetensors", POINTER, "is a git-lfs pointer"),
        ("tokenizer.json", POINTER, "is a git-lfs pointer"),
        ("config.json", POINTER, "is a git-lfs pointer"),
        ("config.json", "", "config.json is empty"),
        ("config.json", "[]", "found list, expected an object"),
        ("config.json", '{"model_type": "lla', "config.json is cut or no .json file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "lacks model-00001-of"),
    ],
)
def test_a_broken_file_of_a_folder_is_named(model: Path, name: str, content: str, expected: str) -> None:
    (model / name).write_text(content)
    assert expected in (damage(model) or "")


def test_an_adapter_names_the_base_that_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/llama", "peft_type": "LORA"}))
    save_file(STATE, tmp_path / "adapter_model.safetensors")
    assert "is an adapter without its base (meta/llama); merge the two" in (damage(tmp_path) or "")


def test_a_folder_without_weights_says_what_it_holds(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").unlink()
    assert "holds no weights (*.safetensors or *pytorch_model*.bin), only config.json" in (damage(model) or "")
