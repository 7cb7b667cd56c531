"""A fusion for towers of unequal widths: the reference's own embedding plus a learned change."""

import torch
from torch import nn
from torch.nn import functional

GAIN = 4.0  # features of norm 1 are small for a default linear layer: this brings them into GELU's curved range


class ResidualFusion(nn.Module):
    """q = normalise(sigmoid(g) * x + W_o [GELU(4 W_x x), GELU(4 W_t t)]), g a learned number.

    x and t are normalised here. x float [B, width], t float [B, text_width]; q is float32 [B, width]. It stays in the
    space of x, so galleries need no second index; the Combiner's text term needs equal widths, this does not.
    """

    def __init__(self, width: int, text_width: int, hidden: int | None = None, dropout: float | None = None) -> None:
        super().__init__()
        hidden, dropout = hidden or 1024, 0.3 if dropout is None else dropout
        self.image = nn.Linear(width, hidden)
        self.text = nn.Linear(text_width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * hidden, width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Composed queries [B, width] of norm 1."""
        image, text = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
        both = torch.cat([functional.gelu(GAIN * self.image(image)), functional.gelu(GAIN * self.text(text))], dim=-1)
        change = self.output(self.dropout(both))
        return functional.normalize((self.gate.sigmoid() * image + change).float(), dim=-1)
