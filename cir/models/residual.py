"""A fusion for towers of unequal widths: the reference's own embedding plus a learned change."""

import torch
from torch import nn
from torch.nn import functional

FIRST_GATE = -2.0  # from 0, queries stay too close to the reference (cross-validation; docs/results.md)
GAIN = 4.0  # features of norm 1 are small for a default linear layer: this brings them into GELU's curved range


class ResidualFusion(nn.Module):
    """q = normalise(sigmoid(g) * x + W_o [GELU(4 W_x x), GELU(4 W_t t)]), g a learned number.

    x and t are normalised here. x float [B, width], t float [B, text_width]; q is float32 [B, width]. It stays in the
    space of x, so galleries need no second index; the Combiner's text term needs equal widths, this does not. With few
    labels the change overfits the reference: `image_hidden` units see it, and with 0 of them the change is the text's alone.
    """

    def __init__(
        self,
        width: int,
        text_width: int,
        hidden: int | None = None,
        image_hidden: int | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        hidden, dropout = hidden or 1024, 0.3 if dropout is None else dropout
        image_hidden = hidden if image_hidden is None else image_hidden
        self.image = nn.Linear(width, image_hidden) if image_hidden else None
        self.text = nn.Linear(text_width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(image_hidden + hidden, width)
        self.gate = nn.Parameter(torch.full((1,), FIRST_GATE))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Composed queries [B, width] of norm 1."""
        image, text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
        seen = functional.gelu(GAIN * self.text(text))
        if self.image is not None:
            seen = torch.cat([functional.gelu(GAIN * self.image(image)), seen], dim=-1)
        return functional.normalize((self.gate.sigmoid() * image + self.output(self.dropout(seen))).float(), dim=-1)
