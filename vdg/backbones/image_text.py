"""Any image-text-to-text model of transformers: it sees pixels and reads the prompt in its own chat template.

Its image tower and projector stay as they are; LoRA goes on its language model alone.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from vdg.backbones.base import Backbone, Batch, collate, with_lora
from vdg.config import VdgConfig
from vdg.description import Description
from vdg.language import load_image_text_model, load_processor
from vdg.prompts import answer_ids, conversation


class ImageTextInputs:
    """Batches of what the model's processor makes of prompts and images: `input_ids` int64 [B, T], pixels, and the like."""

    def __init__(self, description: Description, max_tokens: int) -> None:
        """Answers are cut to `max_tokens`."""
        self.vdg, self.max_tokens = description.vdg, max_tokens

    @cached_property
    def _processor(self) -> Any:
        return load_processor(self.vdg.language_model)

    @cached_property
    def _prompt(self) -> str:
        return self._processor.apply_chat_template(conversation(self.vdg.prompt), add_generation_prompt=True)

    @cached_property
    def _gap(self) -> str:
        """What the template puts between the prompt and an answer: a space after LLaVA's `ASSISTANT:`."""
        answer = {"role": "assistant", "content": [{"type": "text", "text": "@answer"}]}
        whole = self._processor.apply_chat_template([*conversation(self.vdg.prompt), answer])
        return whole[len(self._prompt) :].partition("@answer")[0] if whole.startswith(self._prompt) else ""

    def pairs(self, references: list[Image], targets: list[Image], deltas: Sequence[str] | None = None) -> Batch:
        """Prompts with both images: right-padded with the deltas and their `targets`, or left-padded to generate from."""
        tokenizer = self._processor.tokenizer
        begins = tokenizer.bos_token is not None and self._prompt.startswith(tokenizer.bos_token)
        prompts: Batch = dict(
            self._processor(
                text=[self._prompt] * len(references),
                images=[list(pair) for pair in zip(references, targets, strict=True)],
                add_special_tokens=not begins,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        )
        if deltas is None:
            return prompts
        answers = [answer_ids(tokenizer, text, self.max_tokens, self._prompt[-1], self._gap) for text in deltas]
        return _with_answers(prompts, answers)


def _with_answers(prompts: Batch, answers: list[list[int]]) -> Batch:
    """Left-padded prompts with their answers, right-padded; whatever else is by token (its type) is 0 for an answer's."""
    shape, masks = prompts["input_ids"].shape, prompts["attention_mask"].bool()
    asked = [ids[mask].tolist() for ids, mask in zip(prompts["input_ids"], masks, strict=True)]
    collated = collate(asked, answers)
    batch: Batch = {"input_ids": collated["ids"], "targets": collated["targets"]}
    for name in prompts.keys() - batch.keys():
        values = prompts[name]
        if values.shape == shape:
            by_token = batch[name] = values.new_zeros(batch["input_ids"].shape)
            for row, mask in enumerate(masks):
                by_token[row, : mask.sum()] = values[row, mask]
        else:
            batch[name] = values
    for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        batch["attention_mask"][row, : len(prompt) + len(answer) - 1] = 1
    return batch


class ImageTextBackbone(Backbone):
    """A whole image-text model; `instruct` trains the LoRA of its language model."""

    def __init__(self, description: Description, dtype: torch.dtype = torch.float32, partitioned: bool = False) -> None:
        """`dtype` and `partitioned` (over the ranks, for ZeRO-3) are the frozen model's."""
        config = description.vdg
        frozen: Any = load_image_text_model(config.language_model, dtype, partitioned)
        model = with_lora(frozen, config, _language_layers(frozen, config))
        super().__init__(config, load_processor(config.language_model).tokenizer, model)

    @classmethod
    def inputs(cls, description: Description, mean: np.ndarray | None, max_tokens: int) -> ImageTextInputs:
        """What the model's own processor makes."""
        return ImageTextInputs(description, max_tokens)

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """All but the targets; pixels in the model's precision."""
        inputs = {name: value for name, value in batch.items() if name != "targets"}
        dtype = self.language_model.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _language_layers(model: Any, config: VdgConfig) -> str:
    """A regular expression of the names of the LoRA targets below the language model: image towers have layers named alike."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    targets = "|".join(map(re.escape, config.lora_targets))
    return rf"{re.escape(prefix)}\..*\.({targets})"
