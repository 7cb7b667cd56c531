"""The generator's backbones behind one interface: `features` (an image tower's tokens), `image_text` (pixels), `chooser`."""

from collections.abc import Callable, Iterable
from functools import partial
from pkgutil import resolve_name

import numpy as np
import torch
from safetensors.torch import load

from cluster.artifacts import Output
from cluster.config import TrainingConfig
from cluster.devices import device, uses_bf16
from cluster.training.checkpoints import WEIGHTS, load_trained
from mining.embeddings import MEAN
from mining.features import read_mean
from vdg.backbones.base import Backbone, Inputs
from vdg.description import Description, read_description

# VdgConfig.backbone -> what gives its class: that of another is not loaded, nor the libraries that it needs
BACKBONES: dict[str, Callable[[], type[Backbone]]] = {
    "features": partial(resolve_name, "vdg.backbones.features:FeatureBackbone"),
    "image_text": partial(resolve_name, "vdg.backbones.image_text:ImageTextBackbone"),
    "chooser": partial(resolve_name, "vdg.backbones.chooser:ChooserBackbone"),
}


def build(description: Description, dtype: torch.dtype = torch.float32, partitioned: bool = False) -> Backbone:
    """The generator to train, its frozen model in `dtype` and, if `partitioned`, shared out over the ranks (ZeRO-3)."""
    return BACKBONES[description.vdg.backbone]()(description, dtype, partitioned)


def make_inputs(description: Description, mean: np.ndarray | None = None, max_tokens: int = 32) -> Inputs:
    """What makes the generator's batches; `mean` [dim] is that of the training gallery's features, where it has any."""
    return BACKBONES[description.vdg.backbone]().inputs(description, mean, max_tokens)


def load_generator(model: Output, precision: str = "fp32", texts: Iterable[str] = ()) -> tuple[Backbone, Inputs]:
    """A trained generator on this process's device, its LoRA merged, ready to generate, and what makes its batches.

    `texts`: those that batches may give as deltas, where they are not the labelled ones.

    Raises UserError when `model` holds no trained generator.
    """
    description, dtype = read_description(model), torch.bfloat16 if uses_bf16(precision) else torch.float32
    generator = build(description, dtype)
    load_trained(generator, load(model.read_bytes(WEIGHTS)))
    generator.merge()
    mean = read_mean(model) if model.exists(MEAN) else None
    asked = description.model_copy(update={"texts": tuple(texts) or description.texts})
    return generator.to(device(), dtype).eval(), make_inputs(asked, mean)


def build_for_training(description: Description, training: TrainingConfig) -> Backbone:
    """A generator to train, its frozen model in the precision and over the ranks that training says."""
    dtype = torch.bfloat16 if uses_bf16(training.precision) else torch.float32
    return build(description, dtype, partitioned=training.zero_stage == 3)
