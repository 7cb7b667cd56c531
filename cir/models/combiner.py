"""The paper's fusion for towers of one width (PAPER 3.1; the Combiner of CLIP4Cir)."""

import torch
from torch import nn
from torch.nn import functional


class Combiner(nn.Module):
    """c = normalise(MLP(h) + s * t + (1 - s) * x), with h = [ReLU(W_x x), ReLU(W_t t)] and a gate s = sigmoid(MLP'(h)).

    x and t are the un-normalised image and text embeddings, both float [B, width]; c is float32 [B, width].
    """

    def __init__(self, width: int, hidden: int | None = None, dropout: float | None = None) -> None:
        super().__init__()
        hidden, dropout = hidden or 2 * width, dropout or 0.0
        self.image = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.text = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.mix = nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.gate = nn.Sequential(
            nn.Linear(2 * width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Composed queries [B, width] of norm 1."""
        both = torch.cat([self.image(image), self.text(text)], dim=-1)
        gate = self.gate(both)
        return functional.normalize((self.mix(both) + gate * text + (1 - gate) * image).float(), dim=-1)
