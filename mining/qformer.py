"""The image side of InstructBLIP and BLIP-2: a ViT read by a Q-Former's learned queries, without any text.

The paper's features (section 3.1): 32 tokens of width 768 an image. Of the checkpoint only the tensors of this side are
read, and from a hub only the shards that hold some of them are fetched: never the language model of 13 billion weights.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import (
    Blip2Config,
    Blip2QFormerModel,
    Blip2VisionModel,
    InstructBlipConfig,
    InstructBlipQFormerModel,
    InstructBlipVisionModel,
)

from cluster.errors import UserError
from cluster.weight_files import damage
from cluster.weights import Weights
from mining.pretrained import config_of

SHARDS = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_CLASSES = {
    InstructBlipConfig: (InstructBlipVisionModel, InstructBlipQFormerModel),
    Blip2Config: (Blip2VisionModel, Blip2QFormerModel),
}


class QFormer(nn.Module):
    """Pixels float [B, 3, size, size] to the outputs [B, queries, dim] of the learned queries."""

    def __init__(self, config: Any) -> None:
        """`config`: of a whole InstructBLIP or BLIP-2; the weights are random until they are loaded."""
        super().__init__()
        vision, qformer = _CLASSES[type(config)]
        self.vision_model: Any = vision(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer: Any = qformer(config.qformer_config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The queries alone go in: InstructBLIP's instruction tokens are left out ("without using prompts", section 3.1)."""
        patches = self.vision_model(pixel_values=pixels).last_hidden_state
        queries = self.query_tokens.expand(len(pixels), -1, -1)
        text = {"input_ids": None} if isinstance(self.qformer, InstructBlipQFormerModel) else {}  # a required argument
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches, **text).last_hidden_state


def load_qformer(weights: Weights) -> QFormer:
    """The image side of a checkpoint. Raises UserError when it is another model's, or has no safetensors."""
    model = QFormer(_config(weights))
    model.load_state_dict(_read(_fetcher(weights), list(model.state_dict()), weights.location()))
    return model


def check_qformer(weights: Weights) -> None:
    """Raises UserError as `load_qformer` does, but of a local checkpoint alone for what its files hold; no tensor is read."""
    config = _config(weights)
    if weights.hub is None:
        with torch.device("meta"):
            names = list(QFormer(config).state_dict())
        _read(_fetcher(weights), names, weights.location(), headers=True)


def _config(weights: Weights) -> Any:
    config = config_of(weights)
    if type(config) not in _CLASSES:
        raise UserError(
            f"output 'qformer' takes an InstructBLIP or BLIP-2 checkpoint; {weights.location()} is {config.model_type}"
        )
    return config


def _fetcher(weights: Weights) -> Callable[[str], Path | None]:
    """Gives the local path of a file of the checkpoint, downloaded where it comes from a hub; None where it is missing."""
    if weights.hub is None:
        folder = Path(weights.location())
        return lambda name: folder / name if (folder / name).exists() else None
    repository, revision = weights.hub, weights.revision

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError:
            return None

    return fetch


def _read(
    fetch: Callable[[str], Path | None], names: list[str], location: str, headers: bool = False
) -> dict[str, torch.Tensor]:
    """Some tensors of a checkpoint, from those of its files alone that hold them. With `headers` only their names are read."""
    index = fetch(SHARDS)
    shard_of = json.loads(index.read_text())["weight_map"] if index else dict.fromkeys(names, WHOLE)
    if missing := [name for name in names if name not in shard_of]:
        raise UserError(f"{location} has no tensor {missing[0]}: it is not a whole InstructBLIP or BLIP-2")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted({shard_of[name] for name in names}):
        path = fetch(shard)
        if path is None:
            raise UserError(f"{location} has no {shard}; give a checkpoint in safetensors format")
        if found := damage(path):
            raise UserError(found)
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            if missing := [name for name in names if shard_of[name] == shard and name not in held]:
                raise UserError(f"{path} has no tensor {missing[0]}: it is not a whole InstructBLIP or BLIP-2")
            if not headers:
                tensors |= {name: file.get_tensor(name) for name in names if shard_of[name] == shard}
    return tensors
