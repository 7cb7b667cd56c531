"""Every backbone trains, is saved, comes back and generates: tiny models of the real classes on real photos."""

import numpy as np
import pytest
import torch
from safetensors.torch import load

from cluster.artifacts import Output
from cluster.config import TrainingConfig, WorkerResources
from cluster.training.checkpoints import WEIGHTS
from mining import tables
from mining.config import TowerConfig, ViewsConfig
from mining.features import Features
from mining.images import render
from mining.towers import ImageTower
from tests import tiny
from tests.stages import centred_by_own
from tests.vdg.conftest import write_embeddings
from tests.vdg.stages import instruct
from vdg.backbones import build
from vdg.config import GenerateConfig, InstructConfig, VdgConfig
from vdg.description import describe
from vdg.generate import Generation, PartGenerator
from vdg.images import Images, ImageSource

CONFIG = InstructConfig(training=TrainingConfig(steps=2, batch_size=4, learning_rate=1e-2))
PART = "part-00000.parquet"


def _features(folder: Output, tower: TowerConfig, photos) -> Features:
    pixels = np.stack([render(content, tower, ViewsConfig(), (0, 0)) for _, content in photos[:12]])
    return centred_by_own(write_embeddings(folder, ImageTower(tower)(torch.from_numpy(pixels)).cpu().numpy()[None]))


@pytest.fixture
def made(request, tmp_path, photos, gallery, vdg) -> tuple[ImageSource, VdgConfig, int | None]:
    """Images, the backbone's config, and the number of tokens an image."""
    folder, embeddings = tmp_path / "weights", Output(str(tmp_path / "tower"))
    folder.mkdir()
    if request.param in ("llava", "qwen"):
        config = vdg(backbone="image_text", language_model=tiny.image_text_model(request.param, folder))
        return Images((gallery,)), config, None
    if request.param == "patches":
        tower = TowerConfig(library="timm", model="test_vit", image_size=160, output="tokens")
        return _features(embeddings, tower, photos), vdg(projection="mlp", tokens_per_feature=1), 101
    weights = tiny.q_former(request.param, folder)
    tower = TowerConfig(library="transformers", model="", image_size=32, resize="squash", output="qformer", weights=weights)
    return _features(embeddings, tower, photos), vdg(tokens_per_feature=1, center=False), 3


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("made", ["instructblip", "blip2", "patches", "llava", "qwen"], indirect=True)
def test_a_backbone_trains_comes_back_and_generates(made, triplets, pairs, tmp_path, monitor):
    images, vdg, tokens = made
    model, output = Output(str(tmp_path / "model")), Output(str(tmp_path / "out"))
    description = describe("instruct", images, vdg)
    assert description.tokens == tokens
    instruct(model, images, triplets, None, vdg, CONFIG, 0, WorkerResources(workers=0), monitor)

    weights = load(model.read_bytes(WEIGHTS))
    fresh = build(description)
    assert weights.keys() == {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("projection.") for name in weights)
    assert all(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)  # they start at 0

    config = GenerateConfig(greedy=True, max_new_tokens=6, batch_size=7, precision="fp32")
    actor = PartGenerator(Generation(output, images, pairs, model, config, 0), 1)
    actor({"part": np.array([PART])})
    made_triplets = output.read_table(PART, tables.TRIPLETS)
    assert len(made_triplets) + len(output.rejects()) == 7
    fresh.load_state_dict(weights, strict=False)
    asked = pairs.read_table(PART, tables.PAIRS)
    seen = [actor.images.take(asked[name].to_numpy(), np.zeros(7, int)) for name in ("reference_id", "target_id")]
    texts, _ = fresh.eval().generate(actor.inputs.pairs(*seen), config, seed=0)
    assert [deltas[0] for deltas in made_triplets["deltas"].to_pylist()] == [text for text in texts if text]
