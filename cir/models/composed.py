"""Composed retrieval: text encoder, fusion and temperature, trained against frozen target features."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cir.config import VariantConfig
from cir.losses import gather_blocks, semi_supervised
from cir.models.combiner import Combiner
from cir.models.residual import ResidualFusion
from cir.models.text import TextEncoder
from cluster.errors import UserError

FIXED_SCALE = 1 / 0.01  # tau of the paper's Combiner
FIRST_LOG_SCALE = 2.9
MAX_SCALE = 100.0


class ComposedRetrieval(nn.Module):
    """Query c = fusion(reference, text(delta)), compared with the target's frozen image features (PAPER 3.1).

    `text` may be taken away (None) where a frozen encoder's outputs are given in place of tokens.
    """

    def __init__(self, config: VariantConfig, dim: int, encoder: TextEncoder) -> None:
        super().__init__()
        self.config = config
        self.text: TextEncoder | None = encoder
        self.fusion = _fusion(config, dim, encoder.width)
        learned = config.temperature == "learned"
        self.log_scale = nn.Parameter(torch.full((1,), FIRST_LOG_SCALE)) if learned else None

    def compose(self, reference: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Queries float32 [B, dim] of norm 1.

        `reference`: image features [B, dim], centred when the config says so; `text`: tokens int64 [B, length], or
        the encoder's features float [B, width].
        """
        if not text.is_floating_point():
            assert self.text is not None, "this module was built for cached text features"
            text = self.text(text)
        dtype = next(self.fusion.parameters()).dtype
        inputs = {"image": reference.to(dtype), "text": text.to(dtype)}
        if self.config.zero:
            inputs[self.config.zero] = torch.zeros_like(inputs[self.config.zero])
        return self.fusion(**inputs)

    def scale(self, like: torch.Tensor) -> torch.Tensor:
        """1 / tau, float32 []."""
        if self.log_scale is None:
            return like.new_tensor(FIXED_SCALE, dtype=torch.float32)
        return self.log_scale.float().exp().clamp(max=MAX_SCALE).squeeze()

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Losses of a batch {"reference" [n, dim], "target" [n, dim], "target_id" [n], "text", "supervised"}.

        The first `supervised` rows are labelled, the rest pseudo triplets; rows of all ranks are each other's negatives.
        """
        count = batch["supervised"]
        queries = gather_blocks(self.compose(batch["reference"], batch["text"]), count)
        targets = gather_blocks(functional.normalize(batch["target"].float(), dim=-1), count)
        target_ids = gather_blocks(batch["target_id"], count)
        scale = self.scale(queries)
        labelled = count * len(queries) // len(batch["target_id"])
        losses = semi_supervised(queries, targets, target_ids, labelled, scale)
        return {**losses, "temperature": 1 / scale.detach()}


def _fusion(config: VariantConfig, dim: int, text_width: int) -> nn.Module:
    if config.fusion == "residual":
        return ResidualFusion(dim, text_width, config.hidden, config.image_hidden, config.dropout)
    check_widths(dim, text_width)
    return Combiner(dim, config.hidden, config.dropout)


def check_widths(dim: int, text_width: int) -> None:
    """Raises UserError when the Combiner cannot join towers of these widths."""
    if dim != text_width:
        raise UserError(
            f"train.fusion: the combiner needs image and text features of one width, found {dim} and {text_width}; "
            "use the two towers of one model, or fusion: residual"
        )
