"""What a picture's colours are: a histogram over CIE Lab, which pooled maps of a tower do not hold."""

import torch
from torch.nn import functional

BINS = (5, 7, 7)  # of lightness 0 to 100, and of a* and b* from -60 to 60; what lies outside falls into the last ones
WIDTH = 245  # their product

_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))  # of linear sRGB
_WHITE = (0.9505, 1.0, 1.089)  # D65


def colour_histogram(pixels: torch.Tensor) -> torch.Tensor:
    """Histogram float32 [B, 245] of norm 1 of the middle quarter of pixels uint8 [B, height, width, 3].

    Of each share the root, so that a cosine is the Hellinger affinity of two histograms.
    """
    top, left = pixels.shape[1] // 4, pixels.shape[2] // 4
    middle = pixels[:, top : pixels.shape[1] - top, left : pixels.shape[2] - left]
    lab = _lab(middle.float().flatten(1, 2) / 255)
    lowest = lab.new_tensor((0.0, -60.0, -60.0))
    count = lab.new_tensor(BINS)
    places = ((lab - lowest) / lab.new_tensor((100.0, 120.0, 120.0)) * count).floor().clamp_min(0).minimum(count - 1).long()
    bins = (places[..., 0] * BINS[1] + places[..., 1]) * BINS[2] + places[..., 2]
    counts = torch.zeros(len(pixels), WIDTH, device=pixels.device).scatter_add_(
        1, bins, torch.ones_like(bins, dtype=torch.float32)
    )
    return functional.normalize(counts.sqrt(), dim=1)


def _lab(rgb: torch.Tensor) -> torch.Tensor:
    """CIE Lab (D65) of sRGB of 0 to 1, [..., 3]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ rgb.new_tensor(_TO_XYZ).T / rgb.new_tensor(_WHITE)
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
