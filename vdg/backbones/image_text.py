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
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vdg.backbones.base import Batch
from vdg.backbones.language import LanguageBackbone, collate, with_lora
from vdg.config import GenerateConfig, VdgConfig
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
        return load_processor(self.vdg.language)

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


class ImageTextBackbone(LanguageBackbone):
    """A whole image-text model; `instruct` trains the LoRA of its language model."""

    def __init__(self, description: Description, dtype: torch.dtype = torch.float32, partitioned: bool = False) -> None:
        """`dtype` and `partitioned` (over the ranks, for ZeRO-3) are the frozen model's."""
        config = description.vdg
        frozen: Any = load_image_text_model(config.language, dtype, partitioned)
        model = with_lora(frozen, config, _language_layers(frozen, config))
        super().__init__(config, load_processor(config.language).tokenizer, model)

    @classmethod
    def inputs(cls, description: Description, mean: np.ndarray | None, max_tokens: int) -> ImageTextInputs:
        """What the model's own processor makes."""
        return ImageTextInputs(description, max_tokens)

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """All but the targets; pixels in the model's precision."""
        inputs = {name: value for name, value in batch.items() if name != "targets"}
        dtype = self.language_model.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def decode(self, batch: Batch, config: GenerateConfig, seed: int) -> tuple[Tensor, Tensor]:
        """By the model's own `generate`: its pixels, positions and padding are each model's own affair."""
        device, recorder = self.language_model.device, _LogProbabilities()
        inputs = self.model_inputs({name: value.to(device) for name, value in batch.items()})
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = self.language_model.generate(
                **inputs, generation_config=self._decoding(config), logits_processor=LogitsProcessorList([recorder])
            )[:, inputs["input_ids"].shape[1] :]
        return ids, recorder.of(ids)

    def _decoding(self, config: GenerateConfig) -> GenerationConfig:
        end = self.tokenizer.eos_token_id
        sampling = {} if config.greedy else {"temperature": config.temperature, "top_k": config.top_k}
        return GenerationConfig(
            max_new_tokens=config.max_new_tokens, do_sample=not config.greedy, eos_token_id=end, pad_token_id=end, **sampling
        )


class _LogProbabilities(LogitsProcessor):
    """Records the log-probability of each chosen token while `generate` runs.

    It sees the raw logits of a step before temperature and top-k, and at the next step the token that was chosen. So one
    step's logits are held, where `output_logits` holds all: 200 kB a row and token for a vocabulary of 50,000.
    """

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []
        self.logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take a step's logits [B, vocabulary], unchanged; `input_ids` [B, t] are the tokens generated so far."""
        if self.logits is not None:
            self.recorded.append(_log_probability(self.logits, input_ids[:, -1]))
        self.logits = scores
        return scores

    def of(self, ids: Tensor) -> Tensor:
        """Log-probabilities [B, T] of the generated ids [B, T]."""
        if len(self.recorded) < ids.shape[1]:
            assert self.logits is not None
            self.recorded.append(_log_probability(self.logits, ids[:, -1]))
        return torch.stack(self.recorded[: ids.shape[1]], 1)


def _log_probability(logits: Tensor, chosen: Tensor) -> Tensor:
    return -functional.cross_entropy(logits, chosen, reduction="none")  # fused: half the time of a logsumexp


def _language_layers(model: Any, config: VdgConfig) -> str:
    """A regular expression of the names of the LoRA targets below the language model: image towers have layers named alike."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    targets = "|".join(map(re.escape, config.lora_targets))
    return rf"{re.escape(prefix)}\..*\.({targets})"
