"""What every model of composed retrieval has: composed queries, a temperature, and the contrastive losses."""

from typing import Any

import torch
from torch import nn

from cir.config import VariantConfig
from cir.losses import Pairs, semi_supervised

FIXED_SCALE = 1 / 0.01  # the paper's tau


class Retrieval(nn.Module):
    """Queries composed of references and deltas, compared with targets in a frozen space (PAPER 3)."""

    config: VariantConfig

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Tokens int64 [len(texts), length] of deltas, or what stands for them in `compose`."""
        raise NotImplementedError

    def compose(self, reference: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Queries float32 [B, dim] of norm 1."""
        raise NotImplementedError

    def learned_scale(self) -> torch.Tensor:
        """1 / tau float32 [] where it is learned."""
        raise NotImplementedError

    def scale(self, like: torch.Tensor) -> torch.Tensor:
        """1 / tau float32 [], on the device of `like`."""
        if self.config.learns_temperature:
            return self.learned_scale()
        return like.new_tensor(FIXED_SCALE, dtype=torch.float32)

    def losses(self, pairs: Pairs, supervised: int) -> dict[str, torch.Tensor]:
        """Contrastive losses of this rank's pairs and all others'. The first `supervised` are labelled, the rest pseudo."""
        scale = self.scale(pairs.queries)
        gathered = pairs.gathered(supervised)
        labelled = supervised * len(gathered) // len(pairs)
        return {**semi_supervised(gathered, labelled, scale, self.config.loss), "temperature": 1 / scale.detach()}

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Losses of a batch {"reference", "target", "reference_id" [n], "target_id" [n], "text", "supervised"}.

        Images and texts are in the form that the model takes. The first `supervised` rows are labelled.
        """
        raise NotImplementedError
