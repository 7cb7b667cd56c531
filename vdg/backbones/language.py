"""What the backbones share that write with a language model: prompts with answers, the loss, decoding with scores, LoRA."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cluster.errors import UserError
from vdg.backbones.base import IGNORED, Backbone, Batch
from vdg.config import GenerateConfig, VdgConfig
from vdg.prompts import clean


class LanguageBackbone(Backbone):
    """Writes token by token. What is trained is LoRA, and the projection where there is one."""

    def __init__(self, config: VdgConfig, tokenizer: Any, language_model: Any) -> None:
        """`language_model`: what answers and is decoded, frozen but for its LoRA."""
        super().__init__()
        self.config, self.tokenizer, self.language_model = config, tokenizer, language_model

    @abstractmethod
    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the language model takes of a batch: `input_ids` or `inputs_embeds`, and what goes with them."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean next-token cross-entropy over answer and end of text (paper, Eq. 1).

        `batch` is of the backbone's `Inputs`, right-padded; its `targets` int64 [B, T] are the token that follows each
        position, or IGNORED. The vocabulary projection, a fifth of a small model's work, runs only where some row of the
        batch has a target.
        """
        logits, kept = self._answered(batch)
        scored = kept != IGNORED
        return {"loss": functional.cross_entropy(logits[scored].float(), kept[scored])}

    def _answered(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, P, vocabulary] and targets [B, P] of the positions that have a target in some row."""
        positions = (batch["targets"] != IGNORED).any(0).nonzero().squeeze(1)
        logits = self.language_model(**self.model_inputs(batch), logits_to_keep=positions, use_cache=False).logits
        return logits, batch["targets"][:, positions]

    @torch.no_grad()
    def log_likelihood(self, batch: Batch) -> list[float]:
        """As for any backbone: the sum over the tokens of answer and end of text."""
        device = self.language_model.device
        logits, kept = self._answered({name: value.to(device) for name, value in batch.items()})
        losses = functional.cross_entropy(logits.float().transpose(1, 2), kept, ignore_index=IGNORED, reduction="none")
        return (-losses.sum(1)).tolist()

    @torch.no_grad()
    def generate(self, batch: Batch, config: GenerateConfig, seed: int) -> tuple[list[str], list[float]]:
        """As for any backbone: after the paper's post-processing, with mean log-probabilities (nats) of the generated tokens.

        End of text is one of them.
        """
        ids, scores = self.decode(batch, config, seed)
        ended = (ids == self.tokenizer.eos_token_id).int()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1])  # of the generated tokens, end of text included
        texts = [clean(self.tokenizer, row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        spoken = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        return texts, (scores.where(spoken, 0).sum(1) / lengths).tolist()

    @abstractmethod
    def decode(self, batch: Batch, config: GenerateConfig, seed: int) -> tuple[Tensor, Tensor]:
        """New ids [B, at most max_new_tokens], until every row has ended, and their log-probabilities under the model."""

    def merge(self) -> None:
        """Fold LoRA into the language model's weights: as good as free at generation, but no longer trainable."""
        if hasattr(self.language_model, "merge_and_unload"):
            self.language_model = self.language_model.merge_and_unload()


def collate(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Batch:
    """Right-padded `ids` and `targets` [B, T]: each position's target is the id after it, where that is the answer's."""
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer) - 1
        ids[row, :end] = torch.tensor(prompt + answer[:-1])
        targets[row, len(prompt) - 1 : end] = torch.tensor(answer)
    return {"ids": ids, "targets": targets}


def with_lora(model: PreTrainedModel, config: VdgConfig, targets: list[str] | str) -> nn.Module:
    """The model with LoRA on the layers `targets`, by the end of their names or a regular expression of whole names."""
    try:
        return get_peft_model(model, lora_config(config, targets))
    except ValueError as error:
        raise UserError(
            f"lora_targets {list(config.lora_targets)}: {error}; name this language model's query and value layers"
        ) from error


def lora_config(config: VdgConfig, targets: list[str] | str) -> LoraConfig:
    """PEFT's config of the LoRA on the layers `targets`, named as in `with_lora`."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
