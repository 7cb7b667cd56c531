"""Frozen image towers of timm, open_clip and transformers: uint8 pixels to vectors by one call, and whether one would load."""

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cluster.devices import device, uses_bf16
from cluster.errors import UserError
from cluster.weights import Weights
from mining.colours import colour_histogram
from mining.config import TowerConfig
from mining.pretrained import Colour, check_model, colours_of, config_of, source_of, tokenizer_of

_Loaded = tuple[nn.Module, Colour, Colour]  # a model, and the mean and deviation of the pixels (0 to 1) it was trained on


class ImageTower(nn.Module):
    """A frozen tower on this process's device.

    Call it with pixels uint8 [B, size, size, 3]; it gives float32 [B, tokens, dim]: one token when the output is pooled.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.bfloat16 if uses_bf16(config.precision) else torch.float32
        load, self._run = LIBRARIES[config.library]
        model, mean, std = load(config)
        self.model: Any = model.eval().requires_grad_(False).to(self.dtype)
        self.mean, self.std = config.mean or mean, config.std or std
        self.to(device())

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels are normalised here, on the device."""
        images = normalised(pixels.to(device(), non_blocking=True), self.mean, self.std)
        values = self._run(self.model, images.to(self.dtype), self.config.output)
        if self.config.output == "levels":
            values = torch.cat([values, colour_histogram(pixels.to(device()))], 1)
        return values.float() if values.ndim == 3 else values.float().unsqueeze(1)


def normalised(pixels: torch.Tensor, mean: Colour, std: Colour) -> torch.Tensor:
    """Images float32 [B, 3, size, size] of pixels uint8 [B, size, size, 3]; mean and deviation are of 0 to 1."""
    middle, spread = (torch.tensor(colour, device=pixels.device).view(3, 1, 1) * 255 for colour in (mean, std))
    return (pixels.permute(0, 3, 1, 2).float() - middle) / spread


def _load_timm(config: TowerConfig) -> _Loaded:
    import timm
    from timm.utils.model import reparameterize_model

    hub = config.weights.hub if config.weights else None
    if hub:
        revision = f"@{config.weights.revision}" if config.weights and config.weights.revision else ""
        model: Any = timm.create_model(f"hf-hub:{hub}{revision}", pretrained=True, num_classes=0)
    else:
        model = timm.create_model(config.model, pretrained=False, num_classes=0 if not config.weights else 1000)
        if config.weights:
            load_state(model, Path(config.weights.location()), config.by_order)
            model.reset_classifier(0)
    mean, std = (model.pretrained_cfg[name] for name in ("mean", "std"))
    return _fold_batch_norm(reparameterize_model(model.eval())), mean, std


def load_state(model: nn.Module, path: Path, by_order: bool, place: str = "cpu") -> None:
    """Raises UserError when the file's tensors are not the model's. On `place` meta none of them is read."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the weights in it by 'file'")
    state, expected = _state(path, place), model.state_dict()
    if by_order:
        shapes = [value.shape for value in state.values()], [value.shape for value in expected.values()]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: its tensors do not have the shapes of the model's, in order; check 'model'")
        state = dict(zip(expected, state.values(), strict=True))
    try:
        model.load_state_dict(state, assign=place == "meta")
    except (RuntimeError, TypeError, AttributeError) as error:  # the latter of what is no state at all
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its tensors are not those of the model; check 'model' and 'by_order': {why}") from error


def _state(path: Path, place: str) -> dict[str, torch.Tensor]:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location=place, weights_only=True)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        if place != "meta":
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


def _fold_batch_norm(model: Any) -> nn.Module:
    """Fold each batch norm into the convolution before it: 1.7 times as fast on a CPU.

    Neighbours by definition need not be neighbours in the forward pass, so a model whose output changes stays as it was.
    """
    folded = copy.deepcopy(model)
    for module in list(folded.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
    images = torch.rand(1, 3, *model.pretrained_cfg["input_size"][1:])
    with torch.inference_mode():
        same = torch.allclose(model(images), folded(images), rtol=1e-3, atol=1e-4)
    return folded if same else model


def _load_open_clip(config: TowerConfig) -> _Loaded:
    import open_clip

    name, checkpoint = open_clip_source(config.model, config.weights)
    model: Any = open_clip.create_model(name, pretrained=checkpoint, weights_only=True)
    return model, model.visual.image_mean, model.visual.image_std


def open_clip_source(model: str, weights: Weights | None) -> tuple[str, str | None]:
    """(model name, checkpoint file) as `open_clip.create_model` takes them; a hub repository is fetched at its revision."""
    if weights is None:
        return model, None
    if weights.hub is None:
        location = weights.location()
        return (f"local-dir:{location}", None) if Path(location).is_dir() else (model, location)
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.txt", "*.model", "open_clip_*"]  # configs, tokenisers and weights, not those of other libraries
    return f"local-dir:{snapshot_download(weights.hub, revision=weights.revision, allow_patterns=files)}", None


def open_clip_config(model: str, weights: Weights | None) -> dict[str, Any]:
    """The config of an architecture: the library's own, or that of a repository or folder.

    Raises UserError when there is none.
    """
    import open_clip

    if weights and (weights.hub or Path(weights.location()).is_dir()):
        return _own_config(weights)
    found: dict[str, Any] | None = open_clip.get_model_config(model)
    if found is None:
        raise UserError(f"open_clip knows no model {model!r}; `open_clip.list_models()` gives its names")
    return found


def _own_config(weights: Weights) -> dict[str, Any]:
    location, name = weights.location(), "open_clip_config.json"
    if weights.hub:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(weights.hub, name, revision=weights.revision))
    else:
        path = Path(location) / name
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())["model_cfg"]
    except (OSError, KeyError) as error:
        raise UserError(f"{location} has no {name} of open_clip ({error}); name a checkpoint of its by 'file'") from error
    return found


def _load_transformers(config: TowerConfig) -> _Loaded:
    from transformers import AutoModel, BlipForImageTextRetrieval

    assert config.weights is not None
    if config.output == "qformer":
        from mining.qformer import load_qformer

        return load_qformer(config.weights), *colours(config)
    kind: Any = BlipForImageTextRetrieval if config.output == "projected" else AutoModel
    return kind.from_pretrained(**source_of(config.weights)), *colours(config)


def colours(config: TowerConfig) -> tuple[Colour, Colour]:
    """The mean and deviation of a transformers tower's pixels: the config's, or those it was saved with.

    Raises UserError when there are neither.
    """
    assert config.weights is not None
    return (config.mean, config.std) if config.mean and config.std else colours_of(config.weights)


def _forward_timm(model: Any, images: torch.Tensor, output: str) -> torch.Tensor:
    if output == "pooled":
        return model(images)
    if output == "levels":
        last, levels = model.forward_intermediates(images)
        vectors = [model.forward_head(last), *(_middle(level) for level in levels)]
        return torch.cat([functional.normalize(vector.float(), dim=1) for vector in vectors], 1)
    features = model.forward_features(images)
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


def _middle(level: torch.Tensor) -> torch.Tensor:
    """Mean [B, channels] of the middle quarter of a map [B, channels, height, width]: more of the object, less around it."""
    top, left = (side // 4 for side in level.shape[2:])
    return level[:, :, top : level.shape[2] - top, left : level.shape[3] - left].mean((2, 3))


def _forward_open_clip(model: Any, images: torch.Tensor, output: str) -> torch.Tensor:
    if output == "pooled":
        return model.encode_image(images)
    model.visual.output_tokens = True
    return model.visual(images)[1]


def _forward_transformers(model: Any, images: torch.Tensor, output: str) -> torch.Tensor:
    if output == "qformer":
        return model(images)
    vision = getattr(model, "vision_model", model)
    if output != "pooled":
        tokens = vision(pixel_values=images).last_hidden_state
        return tokens if output == "tokens" else model.vision_proj(tokens[:, 0])
    if hasattr(model, "get_image_features"):
        features = model.get_image_features(pixel_values=images)
        return features if isinstance(features, torch.Tensor) else features.pooler_output
    return vision(pixel_values=images).pooler_output


# TowerConfig.library -> how its models are loaded, and how one runs: images [B, 3, size, size] to [B, dim] or [B, tokens, dim]
LIBRARIES: dict[str, tuple[Callable[[TowerConfig], _Loaded], Callable[[Any, torch.Tensor, str], torch.Tensor]]] = {
    "timm": (_load_timm, _forward_timm),
    "open_clip": (_load_open_clip, _forward_open_clip),
    "transformers": (_load_transformers, _forward_transformers),
}


def _check_timm(config: TowerConfig) -> None:
    """Raises UserError when timm knows no such model, or the file holds other tensors than its."""
    import timm

    weights = config.weights
    if weights and weights.hub:
        from timm.models import load_model_config_from_hf

        revision = f"@{weights.revision}" if weights.revision else ""
        name = load_model_config_from_hf(f"{weights.hub}{revision}")[1]
    else:
        name = config.model
    if not timm.is_model(name):
        raise UserError(f"timm knows no model {name!r}; `timm.list_models()` gives its names")
    if weights and not weights.hub:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=1000)
        load_state(model, Path(weights.location()), config.by_order, "meta")


def _check_transformers(config: TowerConfig) -> None:
    from transformers import AutoModel

    assert config.weights is not None
    if config.output == "qformer":
        from mining.qformer import check_qformer

        check_qformer(config.weights)
    elif config.output == "projected":
        _check_projected(config, config_of(config.weights))
    else:
        found = check_model(config.weights, AutoModel)
        if not (hasattr(found, "vision_config") or hasattr(found, "num_channels")):
            raise UserError(f"{config.weights.location()} is {found.model_type}, which sees no images; take another model")
    colours(config)


def _check_projected(config: TowerConfig, found: Any) -> None:
    """Raises UserError when the weights of a tower with output `projected` are no BLIP retrieval model for its images."""
    assert config.weights is not None
    location = config.weights.location()
    if "BlipForImageTextRetrieval" not in (found.architectures or []):
        raise UserError(
            f"output 'projected' is of BLIP's retrieval models, {location} is {found.architectures}; give such weights "
            "(Salesforce/blip-itm-large-coco), or output: pooled"
        )
    if found.vision_config.image_size != config.image_size:
        raise UserError(f"image_size is {config.image_size}, {location} takes images of {found.vision_config.image_size}")
    tokenizer_of(config.weights)  # that model reads the deltas too


# TowerConfig.library -> what raises UserError, or whatever the library does, for a tower that would not load
CHECKS: dict[str, Callable[[TowerConfig], object]] = {
    "timm": _check_timm,
    "open_clip": lambda config: open_clip_config(config.model, config.weights),
    "transformers": _check_transformers,
}
