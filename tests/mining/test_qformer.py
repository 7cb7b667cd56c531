"""The image side of tiny InstructBLIP and BLIP-2 checkpoints of the real classes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

from cluster.errors import UserError
from cluster.weights import Weights
from mining.config import TowerConfig
from mining.qformer import load_qformer
from mining.towers import ImageTower, normalised
from tests import tiny

PIXELS = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _tower(weights: Weights) -> ImageTower:
    return ImageTower(
        TowerConfig(
            library="transformers",
            model="",
            output="qformer",
            image_size=32,
            resize="squash",
            weights=weights,
            precision="fp32",
        )
    )


@torch.no_grad()
def test_instructblip_runs_as_if_its_instruction_were_not_there(tmp_path: Path) -> None:
    tower = _tower(tiny.q_former("instructblip", tmp_path))
    whole = InstructBlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    images = normalised(PIXELS, tower.mean, tower.std)
    text = torch.tensor([[7, 8, 9]] * 2)
    hidden, shown = (whole.get_image_features(images, text, torch.full_like(text, mask)).pooler_output for mask in (0, 1))
    found = tower(PIXELS)
    assert found.shape == (2, 3, 24)
    torch.testing.assert_close(whole.language_projection(found), hidden, rtol=1e-4, atol=1e-4)
    assert (hidden - shown).abs().max() > 0.01


@torch.no_grad()
def test_blip2_is_what_transformers_gives_its_language_model(tmp_path: Path) -> None:
    tower = _tower(tiny.q_former("blip2", tmp_path))
    whole = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    images = normalised(PIXELS, tower.mean, tower.std)
    expected = whole.get_image_features(images).pooler_output
    torch.testing.assert_close(whole.language_projection(tower(PIXELS)), expected, rtol=1e-4, atol=1e-4)


def test_shards_of_the_language_model_alone_are_never_read(tmp_path: Path) -> None:
    weights = tiny.q_former("instructblip", tmp_path)
    shard_of = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in shard_of.items() if not name.startswith("language_")}
    others = set(shard_of.values()) - needed
    assert others
    for shard in others:
        (tmp_path / shard).write_bytes(b"")
    load_qformer(weights)


def test_a_hub_checkpoint_is_fetched_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a hub cache that holds the shards of the image side alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--tiny--blip" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    tiny.q_former("instructblip", folder)
    shard_of = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(shard_of.values()) - {s for name, s in shard_of.items() if not name.startswith("language_")}:
        (folder / shard).unlink()
    assert _tower(Weights(hub="tiny/blip", revision="a" * 40))(PIXELS).shape == (2, 3, 24)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, language_model: Weights) -> None:
    with pytest.raises(UserError, match=r"InstructBLIP or BLIP-2 checkpoint; .* is llama"):
        load_qformer(language_model)
    weights = tiny.q_former("blip2", tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_qformer(weights)
    with pytest.raises(ValueError, match="output 'qformer' needs 'library: transformers'"):
        TowerConfig(library="timm", model="test_vit", output="qformer")
