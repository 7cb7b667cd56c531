"""Whether an image tower would load, found without reading a tensor: by the names and shapes of its weights, and its config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.errors import UserError
from mining.config import TowerConfig
from mining.pretrained import check_model, config_of, tokenizer_of
from mining.towers import colours, load_state, open_clip_config


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
