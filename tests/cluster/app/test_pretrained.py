"""Pretrained models of every library that would not load, found before any work."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.app.checks import unloadable
from cluster.artifacts import Output
from cluster.errors import UserError
from cluster.stage import RunContext, Stage
from cluster.weights import Pretrained, Weights
from mining.config import TextTower, TowerConfig
from tests import tiny
from tests.cluster.test_weight_files import POINTER
from vdg.config import VdgConfig

GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _timm(folder: Path) -> Pretrained:
    return TowerConfig(**tiny.image_tower(folder))


def _clip(folder: Path) -> dict[str, Any]:
    import open_clip

    shape = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    save_file(open_clip.model.CLIP(**shape).state_dict(), folder / "open_clip_model.safetensors")
    return {"library": "open_clip", "model": "", "weights": {"folder": str(folder)}}


def _open_clip(folder: Path) -> Pretrained:
    return TowerConfig(**_clip(folder), image_size=32)


def _open_clip_text(folder: Path) -> Pretrained:
    return TextTower(**_clip(folder) | {"model": "own"})


def _transformers(folder: Path) -> Pretrained:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_attention_heads=2)).save_pretrained(folder)
    return TowerConfig(library="transformers", model="", weights=Weights(folder=str(folder)), **GREY)


def _blip(folder: Path) -> Pretrained:
    return TowerConfig(**tiny.blip(folder))


def _qformer(folder: Path) -> Pretrained:
    return TowerConfig(library="transformers", model="", output="qformer", weights=tiny.q_former("blip2", folder))


def _text(folder: Path) -> Pretrained:
    return TextTower(**tiny.text_tower(folder))


def _language(folder: Path) -> Pretrained:
    return VdgConfig(language_model=tiny.language_model(folder))


def _image_text(folder: Path) -> Pretrained:
    return VdgConfig(backbone="image_text", language_model=tiny.image_text_model("llava", folder))


@dataclass(frozen=True, eq=False, kw_only=True)
class Reader(Stage, kind="read"):
    """A stage that loads a text encoder."""

    text: TextTower

    def config_field(self, name: str) -> str:
        return f"{self.name}.{name}"

    def work(self, output: Output, run: RunContext) -> None:
        raise NotImplementedError


Make = Callable[[Path], Pretrained]
ALL: list[Make] = [_timm, _open_clip, _open_clip_text, _transformers, _blip, _qformer, _text, _language, _image_text]
READ_BY_TRANSFORMERS = [_transformers, _blip, _qformer, _text, _language, _image_text]
WITH_TOKENIZER = [_blip, _text, _language, _image_text]


def refused(model: Pretrained) -> str:
    """One line of what is wrong."""
    with pytest.raises(UserError) as error:
        model.check()
    assert "\n" not in str(error.value)
    return str(error.value)


def _largest(folder: Path) -> Path:
    """The file of the weights; of shards that of the learned queries."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder / json.loads(index.read_text())["weight_map"]["query_tokens"]
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("make", ALL)
def test_a_whole_model_passes(make: Make, tmp_path: Path) -> None:
    make(tmp_path).check()


@pytest.mark.parametrize("make", ALL)
def test_a_pointer_or_a_cut_file_in_place_of_the_weights(make: Make, tmp_path: Path) -> None:
    model = make(tmp_path)
    path = _largest(tmp_path)
    content = path.read_bytes()
    path.write_text(POINTER)
    assert f"{path} is a git-lfs pointer" in refused(model)
    path.write_bytes(content[: len(content) // 2])
    assert f"{path} is cut" in refused(model)
    path.unlink()
    assert str(tmp_path) in refused(model)


@pytest.mark.parametrize("make", READ_BY_TRANSFORMERS)
@pytest.mark.parametrize("content", [POINTER, "{}", '{"model_type": "no_such_model"}', None])
def test_a_config_that_is_none(make: Make, tmp_path: Path, content: str | None) -> None:
    model = make(tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert str(tmp_path) in refused(model)


@pytest.mark.parametrize("make", WITH_TOKENIZER)
@pytest.mark.parametrize("content", ["{}", "[]", None])
def test_a_tokenizer_that_is_none(make: Make, tmp_path: Path, content: str | None) -> None:
    model = make(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    assert str(tmp_path) in refused(model)


@pytest.mark.parametrize("make", READ_BY_TRANSFORMERS)
def test_another_model_than_the_field_takes(make: Make, tmp_path: Path) -> None:
    model = make(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    assert str(tmp_path) in refused(model)


@pytest.mark.parametrize("make", ALL)
def test_an_adapter_a_missing_package_and_a_hub_out_of_reach(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = make(tmp_path)
    name = model.source[0]

    def taking(**weights: Any) -> Pretrained:
        return model.model_copy(update={name: Weights(**weights)})

    assert "'no_such_package' is not installed" in refused(taking(package="no_such_package"))
    assert "'a/b' at revision main is not in the local cache and cannot be fetched" in refused(taking(hub="a/b"))
    assert "does not exist" in refused(taking(folder=str(tmp_path / "none")))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/llama"}')
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    assert "without its base (meta/llama)" in refused(taking(folder=str(adapter)))


def test_timm_names_a_model_that_it_does_not_know_and_tensors_that_are_anothers(tmp_path: Path) -> None:
    tower = TowerConfig(**tiny.image_tower(tmp_path))
    assert "timm knows no model 'resnet5'" in refused(tower.model_copy(update={"model": "resnet5"}))
    assert "its tensors are not those of the model" in refused(tower.model_copy(update={"model": "test_vit"}))
    assert "is a folder; name the weights in it by 'file'" in refused(
        tower.model_copy(update={"weights": Weights(folder=str(tmp_path))})
    )
    torch.save([1, 2], tmp_path / "list.pth")
    assert "list.pth" in refused(tower.model_copy(update={"weights": Weights(folder=str(tmp_path), file="list.pth")}))


def test_open_clip_names_what_it_does_not_know(tmp_path: Path) -> None:
    tower = _open_clip(tmp_path)
    file = Weights(folder=str(tmp_path), file="open_clip_model.safetensors")
    assert "open_clip knows no model 'ViT-B-33'" in refused(tower.model_copy(update={"weights": file, "model": "ViT-B-33"}))
    text = TextTower(library="open_clip", model="ViT-B-32", pretrained="openia")
    assert "open_clip has no weights 'openia' of ViT-B-32, only openai" in refused(text)
    (tmp_path / "open_clip_config.json").unlink()
    assert "has no open_clip_config.json" in refused(tower)


def test_a_whole_repository_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--tiny--model" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    model = _language(folder).model_copy(update={"language_model": Weights(hub="tiny/model", revision="a" * 40)})
    model.check()
    (folder / "model.safetensors").unlink()  # a download that was stopped
    assert f"'tiny/model' at revision {'a' * 40} is not in the local cache" in refused(model)


def test_a_model_of_several_stages_is_said_once(tmp_path: Path) -> None:
    text = TextTower(library="transformers", weights=Weights(folder=str(tmp_path / "none")))
    stages = [Reader(name=name, text=text) for name in ("a", "b", "a")]
    assert list(unloadable([*stages])) == ["a.text.weights (and 1 more)"]
