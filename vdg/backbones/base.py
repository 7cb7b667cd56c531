"""What every backbone of the generator is: a module that is trained on pairs with deltas, and writes deltas of pairs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vdg.config import GenerateConfig
from vdg.description import Description

IGNORED = -100  # target of positions that predict nothing
Batch = dict[str, Tensor]


class Inputs(Protocol):
    """The half of a backbone that needs no weights: it makes batches beside the training step."""

    def pairs(self, references: Any, targets: Any, deltas: Sequence[str] | None = None) -> Batch:
        """Both images of each pair, as their source gives them: with the deltas to learn as `targets`, or without any."""


class Backbone(nn.Module, ABC):
    """Writes what turns the reference image into the target image.

    Its parameters that require a gradient are all that is trained and saved. It is built of (description, precision of what
    is frozen, whether that is shared out over the ranks).
    """

    @classmethod
    @abstractmethod
    def inputs(cls, description: Description, mean: np.ndarray | None, max_tokens: int) -> Inputs:
        """What makes its batches; `mean` float32 [dim] is that of the training gallery's features, where it sees features."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The mean loss over the targets of a batch that are not IGNORED."""

    @abstractmethod
    def generate(self, batch: Batch, config: GenerateConfig, seed: int) -> tuple[list[str], list[float]]:
        """Deltas of the B pairs of a batch of `Inputs`, which may be empty, and of each a log-probability (nats).

        The latter under the model's own distribution: before temperature and top-k. `seed`: of the sampling.
        """

    @abstractmethod
    def log_likelihood(self, batch: Batch) -> list[float]:
        """log p(delta | reference, target) of the B pairs with deltas of a batch of `Inputs`: nats, of the whole text."""

    def merge(self) -> None:
        """Make it faster to generate with, though no longer trainable."""


def choose(logits: Tensor, config: GenerateConfig, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """What comes next [rows]: the likeliest, or drawn as `torch.multinomial` draws it for all `count` rows of the batch."""
    if config.greedy:
        return logits.argmax(1)
    noise = torch.empty(count, logits.shape[1], device=logits.device).exponential_(generator=generator)
    best, ids = (logits / config.temperature).topk(min(config.top_k, logits.shape[1]))
    drawn = (best.softmax(1) / noise[rows[:, None], ids]).argmax(1, keepdim=True)
    return ids.gather(1, drawn)[:, 0]
