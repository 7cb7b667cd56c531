"""Decoding and augmenting images on the CPU. Pixels leave as uint8; the tower normalises them on its device."""

import math
import warnings
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from PIL.PngImagePlugin import PngImageFile

from cluster.errors import Rejected
from mining.config import TowerConfig, ViewsConfig

try:
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()

Image.init()
# What an image may be: Pillow would also start Ghostscript on PostScript, whatever the file's name. MPO opens as JPEG.
FORMATS: list[str] = [
    name for name in ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
]
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_BITS, _SAMPLE_FORMAT, _UNSIGNED, _SIGNED, _WHITE_IS_ZERO = 258, 339, 1, 2, 0  # of TIFF
_RANGES = {"F": (1, 255, 65535), "I": (255, 65535, 2**31 - 1, 2**32 - 1)}  # that 32 bits are used for


def has_suffix(name: str) -> bool:
    """Whether a file is an image's by its name."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def without_suffix(name: str) -> str:
    """A name without an image's suffix; other dots are part of it."""
    return str(PurePosixPath(name).with_suffix("")) if has_suffix(name) else name


def decode(content: bytes, max_pixels: int | None = None, formats: list[str] | tuple[str, ...] = tuple(FORMATS)) -> Image.Image:
    """Decode an image whole, upright, as RGB; of an animation the first frame. What is clear becomes white.

    `formats`: Pillow's names of those that are tried. Raises Rejected: empty_file, not_an_image, too_large or truncated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _loaded(_opened(content, max_pixels, formats))


def checked_size(content: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Width and height, upright, of an image that can be decoded whole.

    A JPEG is decoded at an eighth of its size: all its data is read, in a third of the time. Raises Rejected, as `decode`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _opened(content, max_pixels, FORMATS)
        width, height = image.size
        if image.draft(None, (1, 1)) is None:
            return _loaded(image).size
        _loaded(image)
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def _opened(content: bytes, max_pixels: int | None, formats: list[str] | tuple[str, ...]) -> Image.Image:
    if not content:
        raise Rejected("empty_file", "0 bytes")
    try:
        image: Image.Image = Image.open(BytesIO(content), formats=formats)
    except Exception as error:  # of whatever class: each of Pillow's decoders has its own
        reason = "too_large" if isinstance(error, Image.DecompressionBombError) else "not_an_image"
        raise Rejected(reason, str(error)) from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise Rejected("too_large", f"{image.width} x {image.height} pixels, more than max_pixels={max_pixels}")
    return image


def _loaded(image: Image.Image) -> Image.Image:
    try:
        _scale_clear(image)
        image.load()
        turn, upright = _TURNS.get(_orientation(image)), _to_rgb(image)
        return upright if turn is None else upright.transpose(turn)
    except Exception as error:
        raise Rejected("truncated", str(error)) from error


def _scale_clear(image: Image.Image) -> None:
    """Of a PNG of 2 or 4 bits a grey that is clear is meant as it is stored; Pillow scales the pixels alone."""
    bits = {"L;2": 2, "L;4": 4}.get(str(image.tile[0].args)) if isinstance(image, PngImageFile) and image.tile else None
    if bits and isinstance(clear := image.info.get("transparency"), int):
        image.info["transparency"] = clear * 255 // (2**bits - 1)


def _orientation(image: Image.Image) -> int:
    """EXIF's; upright (1) where the tags are broken. Of a TIFF the decoder has applied it, and taken it out."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of whatever class: the image itself is whole
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;") or _is_signed_byte(image):
        return _of_depth(image).convert("RGB")
    if image.mode == "La":  # premultiplied, as RGBa, but Pillow knows only one way out of it
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def _is_signed_byte(image: Image.Image) -> bool:
    """Whether a TIFF's 8 bits of grey have a sign, which Pillow does not say."""
    return image.mode == "L" and getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _SIGNED


def _of_depth(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, or signed, as 8 bits: 16 are all used; of 32 and floats white is that of the range they fill.

    A range is filled where the values come near its white: what a filter throws a little over it is clipped.
    """
    tags, clear = getattr(image, "tag_v2", {}), image.info.get("transparency")
    values = np.asarray(image)
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (2,))[0] == _UNSIGNED:
        values = values.view(np.uint32)
    elif image.mode == "L":
        values = values.view(np.int8)
    shown = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    black = min(shown.min(), 0.0)
    white = shown.max() if black < 0 else _white(image, tags) or _filled(shown.max(), _RANGES[image.mode])
    shown = np.clip((shown - black) / max(white - black, 1e-12), 0, 1)  # with a sign they fill a range of their own
    if tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        shown = 1 - shown
    if isinstance(clear, int):
        shown[values == clear] = 1
    return Image.fromarray(np.rint(255 * shown).astype(np.uint8))


def _white(image: Image.Image, tags: Mapping[int, Any]) -> int | None:
    """What the file says that white is."""
    bits = tags.get(_BITS, (32,) if image.mode in _RANGES else (16,))[0]
    if image.format == "PPM" and image.mode == "I":
        return 65535
    return None if bits >= 32 else 2 ** (bits - (tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _SIGNED)) - 1


def _filled(highest: float, ranges: tuple[int, ...]) -> float:
    """The white of the range that values fill up to the highest; the highest where they fill none."""
    reached = (white for white in ranges if highest <= 1.1 * white and (white == ranges[0] or highest > white / 16))
    return next(reached, highest)


def render(content: bytes, tower: TowerConfig, views: ViewsConfig, seed: tuple[int, int]) -> np.ndarray:
    """Pixels uint8 [size, size, 3] of one view of an image; `seed` is (image_id, view) and view 0 is plain."""
    image = decode(content)
    if seed[1] > 0:
        return np.asarray(_augment(image, tower.image_size, views, seed))
    return np.asarray(plain(image, tower))


def plain(image: Image.Image, tower: TowerConfig) -> Image.Image:
    """An RGB image as the tower takes it, without augmentation."""
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
    """Random crop, mirror, light colour changes and RandAugment; depends on (image_id, view) alone.

    Distributed as torchvision's RandomResizedCrop, RandomHorizontalFlip and ColorJitter, but drawn from a generator of its
    own: theirs draw from torch's global one, which the training thread draws dropout from at the same time.
    """
    rng = np.random.default_rng(seed)
    image = image.crop(_crop_box(rng, *image.size, views)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < views.flip:
        image = ImageOps.mirror(image)
    changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in rng.permutation(len(changes)):
        image = changes[i](image).enhance(rng.uniform(max(0.0, 1 - views.jitter), 1 + views.jitter))
    return _rand_augment(image, rng, *views.rand_augment) if views.rand_augment else image


def _rand_augment(image: Image.Image, rng: np.random.Generator, count: int, magnitude: int) -> Image.Image:
    """RandAugment (arXiv 1909.13719) with the operations and ranges of BLIP's training: each of `count` operations drawn
    uniformly and applied with probability 1/2, in a random direction where it has one."""
    for _ in range(count):
        operation = _OPERATIONS[rng.integers(len(_OPERATIONS))]
        applied, sign = rng.random() < 0.5, rng.choice([-1, 1])
        if applied:
            image = operation(image, magnitude / 10, sign)
    return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY)


_GREY = (128, 128, 128)
_SHIFT = 10 / 384  # share of a side: 10 pixels of BLIP's images
_OPERATIONS: list[Callable[[Image.Image, float, int], Image.Image]] = [  # (image, level 0 to 1, direction)
    lambda image, level, sign: image,
    lambda image, level, sign: ImageOps.autocontrast(image),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),  # level 0.5 changes nothing
    lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    lambda image, level, sign: _affine(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, sign * level * _SHIFT * image.width, 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, sign * level * _SHIFT * image.height),
    lambda image, level, sign: image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=_GREY),
]


def _crop_box(rng: np.random.Generator, width: int, height: int, views: ViewsConfig) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a part of random area and aspect; after ten that do not fit, the largest central one."""
    low, high = views.aspect
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*views.crop), math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
