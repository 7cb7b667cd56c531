"""Composed retrieval: text encoder, fusion and temperature, trained against frozen target features."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cir.config import VariantConfig
from cir.losses import Pairs, Unlabelled
from cir.models.combiner import Combiner
from cir.models.residual import ResidualFusion
from cir.models.retrieval import Retrieval
from cluster.errors import UserError
from mining.texts import KnownTexts, TextEncoder

FIRST_LOG_SCALE = 2.9
MAX_SCALE = 100.0


class ComposedRetrieval(Retrieval):
    """Query c = fusion(reference, text(delta)), compared with the target's frozen image features (PAPER 3.1).

    A frozen encoder may be replaced by what it makes of the texts that will come.
    """

    def __init__(self, config: VariantConfig, dim: int, encoder: TextEncoder | KnownTexts) -> None:
        super().__init__()
        self.config = config
        self.text = encoder
        self.fusion = FUSIONS[config.fusion](config, dim, encoder.width)
        self.log_scale = nn.Parameter(torch.full((1,), FIRST_LOG_SCALE)) if config.learns_temperature else None

    def hold_unlabelled(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """Images int64 [m] of the gallery, their vectors float32 [m, dim] of norm 1: from now on negatives of every query.

        They are no part of the weights.
        """
        self.register_buffer("unlabelled_ids", torch.from_numpy(ids), persistent=False)
        self.register_buffer("unlabelled_vectors", torch.from_numpy(vectors), persistent=False)

    @property
    def _unlabelled(self) -> Unlabelled | None:
        held = dict(self.named_buffers(recurse=False))
        return Unlabelled(held["unlabelled_vectors"], held["unlabelled_ids"]) if held else None

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Tokens as the text encoder takes them, or its features."""
        return self.text.tokenize(texts)

    def compose(self, reference: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Queries float32 [B, dim] of norm 1.

        `reference`: image features [B, dim], centred when the config says so; `text`: tokens int64 [B, length], or
        the encoder's features float [B, width].
        """
        if not text.is_floating_point():
            assert isinstance(self.text, TextEncoder), "this module was built for cached text features"
            distinct, places = text.unique(dim=0, return_inverse=True)
            text = self.text(distinct)[places]
        dtype = next(self.fusion.parameters()).dtype
        inputs = {"image": reference.to(dtype), "text": text.to(dtype)}
        if self.config.zero:
            inputs[self.config.zero] = torch.zeros_like(inputs[self.config.zero])
        return self.fusion(**inputs)

    def learned_scale(self) -> torch.Tensor:
        """At most 100."""
        assert self.log_scale is not None
        return self.log_scale.float().exp().clamp(max=MAX_SCALE).squeeze()

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Images are features [n, dim], prepared as those of the gallery; texts as in `compose`."""
        queries = self.compose(batch["reference"], batch["text"])
        targets, references = (functional.normalize(batch[role].float(), dim=-1) for role in ("target", "reference"))
        pairs = Pairs(
            queries,
            targets,
            batch["target_id"],
            batch["reference_id"],
            references if self.config.loss.reference_negative else None,
            self._unlabelled,
        )
        return self.losses(pairs, batch["supervised"])


def _combiner(config: VariantConfig, dim: int, text_width: int) -> nn.Module:
    check_widths(dim, text_width)
    return Combiner(dim, config.hidden, config.dropout)


# VariantConfig.fusion -> what builds it, from the config and the widths of images and texts
FUSIONS: dict[str, Callable[[VariantConfig, int, int], nn.Module]] = {
    "combiner": _combiner,
    "residual": lambda config, dim, text_width: ResidualFusion(
        dim, text_width, config.hidden, config.image_hidden, config.dropout
    ),
}


def check_widths(dim: int, text_width: int | None) -> None:
    """Raises UserError when the Combiner cannot join towers of these widths; None: not known yet."""
    if text_width not in (None, dim):
        raise UserError(
            f"train.fusion: the combiner needs image and text features of one width, found {dim} and {text_width}; "
            "use the two towers of one model, or fusion: residual"
        )
