"""Decoding and augmenting images on the CPU. Pixels leave as uint8; the tower normalises them on its device."""

import warnings
from io import BytesIO

import numpy as np
from PIL import Image

from mining.config import TowerConfig, ViewsConfig


class BadImage(Exception):
    """An image that is rejected, with a short reason."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def decode(content: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image whole, as RGB. Raises BadImage: empty_file, not_an_image, too_large or truncated."""
    if not content:
        raise BadImage("empty_file", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "too_large" if isinstance(error, Image.DecompressionBombError) else "not_an_image"
        raise BadImage(reason, str(error)) from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise BadImage("too_large", f"{image.width} x {image.height} pixels, more than max_pixels={max_pixels}")
    try:
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImage("truncated", str(error)) from error


def render(content: bytes, tower: TowerConfig, views: ViewsConfig, seed: tuple[int, int]) -> np.ndarray:
    """Pixels uint8 [size, size, 3] of one view of an image; `seed` is (image_id, view) and view 0 is plain."""
    image = decode(content)
    if seed[1] > 0:
        return np.asarray(_augment(image, tower.image_size, views, seed))
    return np.asarray(_plain(image, tower))


def _plain(image: Image.Image, tower: TowerConfig) -> Image.Image:
    size = tower.image_size
    if tower.resize == "squash":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    box = (left / scale, top / scale, (left + size) / scale, (top + size) / scale)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=_inside(box, image.size))


def _inside(box: tuple[float, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))


def _augment(image: Image.Image, size: int, views: ViewsConfig, seed: tuple[int, int]) -> Image.Image:
    """Random crop, mirror and light colour changes; depends on (image_id, view) alone."""
    import torch
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, views.crop, views.aspect, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(views.flip),
            v2.ColorJitter(views.jitter, views.jitter, views.jitter),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**63)))
        return transform(image)
