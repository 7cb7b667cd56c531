"""What transformers reads beside a model's tensors: its config, its tokenizer, and how its pixels are normalised."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.weights import Weights

Colour = Sequence[float]
# what transformers reads first of a model
MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def source_of(weights: Weights) -> dict[str, Any]:
    """Arguments of any `from_pretrained` for weights in a folder or on a hub. Code that comes with them is never run."""
    return {
        "pretrained_model_name_or_path": weights.location(),
        "revision": weights.revision or "main",
        "trust_remote_code": False,
    }


def config_of(weights: Weights) -> Any:
    """A model's config. Raises UserError when there is none, or transformers knows no such model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**source_of(weights))
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().split("\n")[0]
        raise UserError(f"{weights.location()} has no config that transformers can read: {why}") from error


def check_model(weights: Weights, auto: Any) -> Any:
    """The config of a model that `auto` (AutoModel, or another) loads. Raises UserError when it does not.

    No tensor is read.
    """
    config = config_of(weights)
    if type(config) not in auto._model_mapping:
        raise UserError(f"{weights.location()} is {config.model_type}, which {auto.__name__} does not load; take another model")
    folder = Path(weights.location())
    if weights.hub is None and not any((folder / name).exists() for name in MODELS):
        raise UserError(f"{folder} has none of {', '.join(MODELS)}; bring the model's files under these names")
    return config


def tokenizer_of(weights: Weights, **source: Any) -> Any:
    """A model's tokenizer; `source`: arguments in place of `source_of`. Raises UserError when none lies beside its weights."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(**(source or source_of(weights)))
    except Exception as error:  # of a tokenizer's file that is another one's
        why = str(error).strip().split("\n")[0]
        raise UserError(f"{weights.location()} has no tokenizer that transformers can read: {why}") from error
    if "red" not in tokenizer.decode(tokenizer("red")["input_ids"]).replace(" ", "").lower():  # transformers makes an empty one
        raise UserError(f"{weights.location()} has no tokenizer; bring the model's, which lies beside its weights")
    return tokenizer


def tokens_of(tokenizer: Any, texts: Sequence[str], max_length: int) -> Any:
    """int64 [len(texts), length], padded to the longest text and cut at `max_length`; special tokens in a text are text."""
    options = {"padding": True, "truncation": True, "max_length": max_length, "split_special_tokens": True}
    return tokenizer(texts, return_tensors="pt", **options)["input_ids"]


def colours_of(weights: Weights) -> tuple[Colour, Colour]:
    """Mean and deviation of pixels (0 to 1) that a model's image processor was saved with.

    Raises UserError when it was saved without one.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(**source_of(weights))
    except (OSError, ValueError) as error:
        raise UserError(f"{weights.location()} has no image processor; give the tower's 'mean' and 'std'") from error
    return processor.image_mean, processor.image_std
