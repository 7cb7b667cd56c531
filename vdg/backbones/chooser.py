"""A backbone without a language model: it chooses a delta among the labelled ones.

It departs from the paper, which writes with LLaMA (docs/method.md says what it gains). What no label says it cannot say: it
suits narrow domains, where deltas repeat.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mining.features import centred
from mining.texts import KnownTexts
from vdg.backbones.base import Backbone, Batch, choose
from vdg.config import GenerateConfig
from vdg.description import Description

GAIN = 4.0  # units see images of norm 1, whose coordinates are small
DROPOUT = 0.3
FIRST_LOG_SCALE = 2.9
SHARPNESS = 20.0  # texts of cosine c mean the same by exp(SHARPNESS * (c - 1))


class ChooserInputs:
    """Batches of `features` float32 [B, 2, dim], with the vectors float32 [B, width] of their deltas as `targets`."""

    def __init__(self, description: Description, mean: np.ndarray) -> None:
        """`mean` float32 [dim]: of the training gallery's features."""
        self.description, self.mean = description, mean

    @cached_property
    def _texts(self) -> KnownTexts:
        return known_texts(self.description)

    def pairs(self, references: np.ndarray, targets: np.ndarray, deltas: Sequence[str] | None = None) -> Batch:
        """Images of features [B, tokens, dim]: their tokens averaged, centred, of norm 1."""
        features = torch.from_numpy(centred(np.stack([references, targets], 1).mean(2), self.mean))
        if deltas is None:
            return {"features": features}
        return {"features": features, "targets": functional.normalize(self._texts.tokenize(deltas), dim=-1)}


def known_texts(description: Description) -> KnownTexts:
    """The frozen encoder's vectors of all texts of a description."""
    assert description.vdg.text is not None
    return KnownTexts(description.vdg.text, description.texts)


class ChooserBackbone(Backbone):
    """p(text | reference, target) over the distinct labelled deltas.

    Hidden units of the reference, of the target and of what differs give a vector in the space of a frozen text encoder, and
    a text's logit is its scaled cosine with it. So deltas that are said in other words share what is learned of each.
    """

    vectors: Tensor  # of the texts, float [texts, width], of norm 1

    def __init__(self, description: Description, dtype: torch.dtype = torch.float32, partitioned: bool = False) -> None:
        """All of it is trained: nothing is kept in `dtype`, or `partitioned`."""
        super().__init__()
        hidden = description.vdg.hidden
        assert description.dim is not None
        self.texts = description.texts
        vectors = functional.normalize(known_texts(description).tokenize(self.texts), dim=-1)
        self.register_buffer("vectors", vectors, persistent=False)
        self.reference = nn.Linear(description.dim, hidden)
        self.target = nn.Linear(description.dim, hidden)
        self.dropout = nn.Dropout(DROPOUT)
        self.projection = nn.Linear(3 * hidden, vectors.shape[1])
        self.log_scale = nn.Parameter(torch.full((1,), FIRST_LOG_SCALE))

    @classmethod
    def inputs(cls, description: Description, mean: np.ndarray | None, max_tokens: int) -> ChooserInputs:
        """Pairs of centred vectors; a text is one target, of whatever length."""
        assert mean is not None
        return ChooserInputs(description, mean)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with soft targets: texts that mean the same share the label."""
        targets = self._log_alike(batch["targets"]).softmax(1)
        return {"loss": functional.cross_entropy(self._logits(batch["features"]), targets)}

    @torch.no_grad()
    def generate(self, batch: Batch, config: GenerateConfig, seed: int) -> tuple[list[str], list[float]]:
        """As for any backbone: a score is the log-probability of all texts that mean what the chosen one does."""
        logits = self._logits(batch["features"].to(self.vectors.device))
        rows, generator = torch.arange(len(logits), device=logits.device), torch.Generator(logits.device).manual_seed(seed)
        chosen = choose(logits, config, rows, len(rows), generator)
        scores = (logits.log_softmax(1) + self._log_alike(self.vectors[chosen])).logsumexp(1)
        return [self.texts[place] for place in chosen.tolist()], scores.tolist()

    @torch.no_grad()
    def log_likelihood(self, batch: Batch) -> list[float]:
        """As for any backbone: of all texts that it knows and that mean what the delta does, which need not be one of them."""
        features, targets = (batch[name].to(self.vectors.device) for name in ("features", "targets"))
        return (self._logits(features).log_softmax(1) + self._log_alike(targets)).logsumexp(1).tolist()

    def _logits(self, features: Tensor) -> Tensor:
        """Of every text, float32 [B, texts]."""
        reference, target = features.to(self.vectors.dtype).unbind(1)
        seen = (self.reference(reference), self.target(target), self.target(target - reference))
        hidden = torch.cat([functional.gelu(GAIN * units) for units in seen], 1)
        meant = functional.normalize(self.projection(self.dropout(hidden)).float(), dim=-1)
        return self.log_scale.float().exp() * meant @ self.vectors.float().T

    def _log_alike(self, vectors: Tensor) -> Tensor:
        """How far every text means what those of `vectors` [B, width] do: log of 0 to 1, float32 [B, texts]."""
        return SHARPNESS * (vectors.float() @ self.vectors.float().T - 1)
