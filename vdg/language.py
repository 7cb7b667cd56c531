"""Pretrained causal language models and their tokenizers, from a hub, a folder, or a GGUF file."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel

from cluster.errors import UserError
from cluster.weights import Weights


def load_language_model(weights: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `dtype`; a GGUF's tensors are de-quantised into the plain class, which trains and runs in bf16.

    The weights' own generation defaults (temperature, penalties) are dropped: ours alone count.
    """
    source = _source(weights)
    if "gguf_file" in source:
        source["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(dtype=dtype, **source)
    model.generation_config = GenerationConfig()
    return model


def load_tokenizer(weights: Weights) -> Any:
    """The model's tokenizer. Raises UserError when it has no end-of-text token to close a delta with."""
    tokenizer = AutoTokenizer.from_pretrained(**_source(weights))
    if tokenizer.eos_token_id is None:
        raise UserError(f"language_model: the tokenizer of {weights.location()} has no end-of-text token; take another model")
    return tokenizer


def _source(weights: Weights) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    location = weights.location()
    if weights.hub is not None:
        gguf = {"gguf_file": weights.file} if weights.file else {}
        return {"pretrained_model_name_or_path": location, "revision": weights.revision or "main", **gguf}
    path = Path(location)
    if path.is_file():
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": location}
