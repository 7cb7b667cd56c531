"""Pretrained language models, and image-text models, with what turns texts into their ids: from a hub, a folder, or a GGUF."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.integrations import HfDeepSpeedConfig

from cluster.errors import UserError
from cluster.weights import Weights
from mining.pretrained import check_model, source_of, tokenizer_of
from mining.scratch import shared


def load_language_model(weights: Weights, dtype: torch.dtype, partitioned: bool = False) -> PreTrainedModel:
    """A causal language model, frozen, in `dtype`.

    If `partitioned`, each rank of the process group holds a share of every weight (ZeRO-3). The weights' own generation
    defaults (temperature, penalties) are dropped: ours alone count.
    """
    return with_fused_kernels(_load(AutoModelForCausalLM, weights, dtype, partitioned))


def with_fused_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """On a GPU with Liger's norms, rotary embeddings and gated layers, where they are installed (extra `gpu`) and fit it."""
    if torch.cuda.is_available():
        try:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance
        except ImportError:
            return model
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return model


def load_image_text_model(weights: Weights, dtype: torch.dtype, partitioned: bool = False) -> PreTrainedModel:
    """A model that answers texts and images with text, as `load_language_model` loads one.

    Raises UserError when transformers has no such model for the weights.
    """
    try:
        return _load(AutoModelForImageTextToText, weights, dtype, partitioned)
    except ValueError as error:
        raise UserError(
            f"vdg.language_model: {weights.location()} is no image-text-to-text model; take one, or backbone: features"
        ) from error


def _load(kind: Any, weights: Weights, dtype: torch.dtype, partitioned: bool) -> PreTrainedModel:
    source = _source(weights)
    bf16 = {"enabled": dtype == torch.bfloat16}
    shares = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": bf16}
    zero3 = HfDeepSpeedConfig(shares) if partitioned else None  # transformers partitions while this is alive
    model: PreTrainedModel = kind.from_pretrained(dtype=dtype, **source)
    del zero3
    model.generation_config = GenerationConfig()
    model.requires_grad_(False)
    return model


def load_tokenizer(weights: Weights) -> Any:
    """The model's tokenizer. Raises UserError when it has no end-of-text token to close a delta with."""
    return _with_end(tokenizer_of(weights, **_source(weights)), weights)


def load_processor(weights: Weights) -> Any:
    """An image-text model's processor. Raises UserError when it lacks a chat template, or an end-of-text token."""
    processor = AutoProcessor.from_pretrained(**_source(weights))
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{weights.location()} has no processor with a chat template; take another model")
    tokenizer = _with_end(processor.tokenizer, weights)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _with_end(tokenizer: Any, weights: Weights) -> Any:
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {weights.location()} has no end-of-text token; take another model")
    return tokenizer


def check_language_model(weights: Weights, sees_images: bool) -> None:
    """Raises UserError, or what transformers does, when the model or what reads its texts would not load.

    No tensor is read; of a GGUF its header has been.
    """
    if weights.hub is None and Path(weights.location()).is_file():
        if sees_images or Path(weights.location()).suffix != ".gguf":
            raise UserError(f"{weights.location()} is a file; give the model's folder, or for backbone 'features' a GGUF")
    elif not weights.file:
        check_model(weights, AutoModelForImageTextToText if sees_images else AutoModelForCausalLM)
        (load_processor if sees_images else load_tokenizer)(weights)


def _source(weights: Weights) -> dict[str, Any]:
    """Arguments of `from_pretrained`, for a GGUF too."""
    path, gguf = Path(weights.location()), {"gguf_file": weights.file} if weights.hub and weights.file else {}
    if weights.hub is not None or not path.is_file():
        return source_of(weights) | gguf
    key = f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode()  # once a node: reading it takes half a minute
    return source_of(weights) | {"pretrained_model_name_or_path": str(shared(key, ".model", partial(_convert, path)))}


def _convert(gguf: Path, folder: Path) -> None:
    """A GGUF file's model and tokenizer as a plain folder.

    Its tensors are de-quantised into the plain class, which trains, and runs in any precision.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source)
    plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
