import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from cluster.errors import Rejected
from mining.config import TowerConfig, ViewsConfig
from mining.images import _OPERATIONS, _augment, _crop_box, _to_rgb, checked_size, decode, render

PROJECT = Path(__file__).parents[2]
TOWER = TowerConfig(library="timm", model="unused", image_size=64)


def jpeg(width: int = 90, height: int = 60) -> bytes:
    stream = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_file"),
        (b"hello, no image", "not_an_image"),
        (jpeg()[:700], "truncated"),
        (jpeg(400, 400), "too_large"),
    ],
)
def test_bad_images_have_a_reason(content: bytes, reason: str) -> None:
    for read in (decode, checked_size):
        with pytest.raises(Rejected) as error:
            read(content, max_pixels=100_000)
        assert error.value.reason == reason


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_checked_size_is_that_of_the_decoded_image(kind: str, turn: int) -> None:
    for side in (3, 61, 96):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = turn
        content = encoded(Image.new("RGB", (side, 40)), kind, exif=exif)
        assert checked_size(content) == decode(content).size


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_anywhere_is_checked_as_it_is_decoded(progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    whole = encoded(Image.fromarray(pixels), "JPEG", progressive=progressive)
    for end in range(1, len(whole), 101):
        assert _reason(checked_size, whole[:end]) == _reason(decode, whole[:end])


def _reason(read: Callable[[bytes], object], content: bytes) -> str | None:
    try:
        read(content)
    except Rejected as error:
        return error.reason
    return None


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["DDS", "EPS", "ICO", "PCX", "TGA"])
def test_other_formats_reach_no_decoder(kind: str) -> None:
    with pytest.raises(Rejected, match="not_an_image: cannot identify"):
        decode(encoded(Image.new("RGB", (8, 8)), kind))


def test_postscript_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(Rejected, match="not_an_image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n")


def test_an_image_is_bad_whatever_its_decoder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise NotImplementedError("Unknown pixel format")

    monkeypatch.setitem(Image.OPEN, "JPEG", (fails, None))
    with pytest.raises(Rejected, match="not_an_image: Unknown pixel format"):
        decode(jpeg())


def quadrants() -> Image.Image:
    """Red, green, blue and white corners, wider than high."""
    image = Image.new("RGB", (48, 32), "white")
    for colour, box in (("red", (0, 0, 24, 16)), ("lime", (24, 0, 48, 16)), ("blue", (0, 16, 24, 32))):
        image.paste(colour, box)
    return image


# what a camera that turns the scene so has stored, by EXIF's orientation
STORED = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.rotate(90, expand=True),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.rotate(270, expand=True),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED)
def test_photos_stand_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = decode(encoded(STORED[orientation](quadrants()), kind, exif=exif))
    assert image.size == (48, 32)
    assert np.abs(np.asarray(image).astype(int)[4::8, 4::8] - np.asarray(quadrants())[4::8, 4::8]).max() < 40


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_broken_tags_do_not_spoil_the_image(exif: bytes) -> None:
    assert decode(encoded(quadrants(), "JPEG", exif=exif)).size == (48, 32)


RAMP = np.linspace(0, 1, 16).repeat(4).reshape(16, 4).T


def grey(mode: str, white: float, kind: str = "TIFF", **options: Any) -> bytes:
    types = {"I;16": np.uint16, "I;16B": ">u2", "I": np.int32, "F": np.float32}
    return encoded(Image.fromarray((RAMP * white).astype(types[mode])), kind, **options)


@pytest.mark.parametrize(
    "content",
    [
        grey("I;16", 65535, "PNG"),
        grey("I;16", 65535),
        grey("I;16", 65535, compression="tiff_lzw"),
        grey("I;16B", 65535),
        grey("I;16", 65535, "JPEG2000"),
        grey("I;16", 65535, "PPM"),
        grey("I", 65535),
        grey("I", 255),
        grey("I", 2**31 - 1),
        grey("F", 1),
        grey("F", 255),
        grey("F", 65535),
        grey("F", 1, "PPM"),
        grey("F", 3.5),
        grey("F", 300),
        grey("I", 4095),
    ],
)
def test_every_depth_of_grey_keeps_its_shades(content: bytes) -> None:
    shades = np.asarray(decode(content)).astype(float)
    assert shades == pytest.approx(255 * RAMP[..., None].repeat(3, 2), abs=1.01)


def tiff(samples: bytes, bits: int, sample_format: int) -> bytes:
    """A TIFF of one strip, 64 x 16, of samples that Pillow does not write."""
    height, width = RAMP.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(samples)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(samples)) + samples + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_tiff_says_how_many_bits_are_used() -> None:
    pairs = np.rint(RAMP * 4095).astype(int).reshape(-1, 2).tolist()
    twelve = b"".join((one << 12 | other).to_bytes(3, "big") for one, other in pairs)
    signed = np.rint(RAMP * 32767).astype("<i2").tobytes()
    for content in (tiff(twelve, 12, 1), tiff(signed, 16, 2)):
        assert np.asarray(decode(content))[..., 0] == pytest.approx(255 * RAMP, abs=1.01)
    positive = tiff(np.rint(RAMP * 127).astype("i1").tobytes(), 8, 2)
    assert np.asarray(decode(positive))[..., 0] == pytest.approx(255 * RAMP, abs=2.01)


def test_a_little_over_white_is_clipped() -> None:
    assert np.asarray(decode(grey("F", 1.05)))[..., 0] == pytest.approx(255 * (1.05 * RAMP).clip(max=1), abs=1.01)


def test_a_dark_image_of_16_bits_stays_dark() -> None:
    assert np.asarray(decode(grey("I;16", 250, "PPM"))).max() == np.asarray(decode(grey("I;16", 250, "PNG"))).max() == 1


def test_unsigned_signed_and_broken_numbers() -> None:
    unsigned = Image.fromarray((RAMP * (2**32 - 1)).astype(np.uint32).view(np.int32))
    signed = Image.fromarray((2 * RAMP - 1).astype(np.float32))
    tag = struct.pack("<HHII", 339, 3, 1, 2)  # the samples' format, which Pillow writes as signed
    unsigned_file = encoded(unsigned, "TIFF").replace(tag, struct.pack("<HHII", 339, 3, 1, 1))
    signed_byte = tiff(np.rint(255 * RAMP - 128).astype("i1").tobytes(), 8, 2)
    for content in (unsigned_file, encoded(signed, "TIFF"), signed_byte):
        assert np.asarray(decode(content))[..., 0] == pytest.approx(255 * RAMP, abs=1.01)
    holes = RAMP.astype(np.float32)
    holes[0, 0], holes[1, 0], holes[2, 0] = np.nan, np.inf, -np.inf
    assert np.asarray(decode(encoded(Image.fromarray(holes), "TIFF")))[..., 0].max() == 255


def half_clear(mode: str) -> Image.Image:
    """Black: its left half clear, the right half opaque."""
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (8, 0, 16, 8))
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, "PNG") for mode in ("LA", "RGBA", "P")] + [("RGBA", kind) for kind in ("WEBP", "TIFF", "AVIF", "JPEG2000", "GIF")],
)
def test_what_is_clear_is_white(mode: str, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = np.asarray(decode(encoded(half_clear(mode), kind, **options)))
    assert pixels[:, :6].min() > 240
    assert pixels[:, 10:].max() < 15


@pytest.mark.parametrize(("mode", "clear"), [("L", 0), ("RGB", (0, 0, 0)), ("1", 0), ("I;16", 0)])
def test_a_clear_colour_is_white(mode: str, clear: Any) -> None:
    image = Image.new(mode, (16, 8))
    image.paste({"RGB": (90, 90, 90), "I;16": 90 * 257, "1": 1}.get(mode, 90), (8, 0, 16, 8))
    pixels = np.asarray(decode(encoded(image, "PNG", transparency=clear)))
    assert (pixels[:, :8] == 255).all()
    assert (pixels[:, 8:] == (255 if mode == "1" else 90)).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_clear_grey_of_few_bits_is_white(bits: int) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)
    row = b"\0" + int("".join(f"{x % 2:0{bits}b}" for x in range(8)), 2).to_bytes(bits)
    for clear in (0, 1):
        chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", clear)), (b"IDAT", zlib.compress(2 * row)), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*given) for given in chunks)
        shades = [255 if x % 2 == clear else x % 2 * 255 // (2**bits - 1) for x in range(8)]
        assert np.asarray(decode(content))[0, :, 0].tolist() == shades


MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"),
    *("CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"),
)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    made = _to_rgb(Image.new(mode, (4, 3)))
    assert (made.mode, made.size) == ("RGB", (4, 3))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_every_mode_of_alpha_is_laid_on_white(mode: str) -> None:
    assert _to_rgb(Image.new(mode, (2, 2))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_colours_stay_what_they_are(mode: str) -> None:
    image = quadrants()
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        stored: Any = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        stored = image.convert(mode)
    pixels = np.asarray(decode(encoded(stored, "TIFF"))).astype(int)
    assert np.abs(pixels[8::16, 12::24] - np.asarray(image)[8::16, 12::24]).max() < 25


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    content = encoded(quadrants(), kind, save_all=True, append_images=[Image.new("RGB", (48, 32), "black")])
    image = decode(content)
    assert np.abs(np.asarray(image).astype(int)[8::16, 12::24] - np.asarray(quadrants())[8::16, 12::24]).max() < 40


def test_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    stream = BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 100_000
    with pytest.raises(Rejected, match="too_large"):
        decode(stream.getvalue(), max_pixels=89_478_485)


def test_plain_view_is_resized_and_cropped() -> None:
    pixels = render(jpeg(), TOWER, ViewsConfig(), (1, 0))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    squashed = render(jpeg(), TOWER.model_copy(update={"resize": "squash"}), ViewsConfig(), (1, 0))
    assert squashed.shape == (64, 64, 3)
    assert not np.array_equal(pixels, squashed)


def test_views_depend_on_image_and_view_alone() -> None:
    first = render(jpeg(), TOWER, ViewsConfig(count=5), (7, 1))
    assert np.array_equal(first, render(jpeg(), TOWER, ViewsConfig(count=5), (7, 1)))
    assert not np.array_equal(first, render(jpeg(), TOWER, ViewsConfig(count=5), (7, 2)))
    assert not np.array_equal(first, render(jpeg(), TOWER, ViewsConfig(count=5), (8, 1)))


def test_grey_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        assert decode(encoded(Image.new(mode, (30, 30)), "PNG")).mode == "RGB"


def test_views_do_not_share_the_generator_of_the_training_thread() -> None:
    script = "import sys; from tests.mining.test_images import *; render(jpeg(), TOWER, ViewsConfig(count=2), (7, 1))"
    subprocess.run([sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"], check=True, cwd=PROJECT)


def test_views_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import v2

    views, size = ViewsConfig(), (90, 60)
    theirs = v2.RandomResizedCrop(1, views.crop, views.aspect)
    image = Image.new("RGB", size)
    drawn = [theirs.make_params([image]) for _ in range(2000)]
    expected = np.array([(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in drawn])
    boxes = np.array([_crop_box(np.random.default_rng(i), *size, views) for i in range(2000)])
    left, top, right, bottom = boxes.T
    assert (boxes >= 0).all()
    assert right.max() <= 90
    assert bottom.max() <= 60
    area = (right - left) * (bottom - top) / 5400
    assert 0.48 < area.min() < area.max() < 1.02
    assert boxes.mean(0) == pytest.approx(expected.mean(0), abs=1)
    assert boxes.std(0) == pytest.approx(expected.std(0), abs=1)


@pytest.mark.parametrize("size", [(300, 10), (10, 300), (1, 1)])
def test_an_image_that_no_crop_fits_is_cropped_in_its_middle(size: tuple[int, int]) -> None:
    left, top, right, bottom = _crop_box(np.random.default_rng(0), *size, ViewsConfig(crop=(0.9, 1.0)))
    assert abs(left + right - size[0]) <= 1
    assert abs(top + bottom - size[1]) <= 1
    assert min(right - left, bottom - top) == min(size)


def test_half_of_the_views_are_mirrored_and_brightness_varies() -> None:
    views = ViewsConfig(crop=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.5, jitter=0.1)
    image = Image.fromarray(np.repeat(np.linspace(50, 200, 64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    drawn = [np.asarray(_augment(image, 64, views, (1, view)), np.float32) for view in range(200)]
    mirrored = np.array([pixels[:, 0].mean() > pixels[:, -1].mean() for pixels in drawn])
    assert 0.4 < mirrored.mean() < 0.6
    change = np.array([pixels.mean() / np.asarray(image).mean() for pixels in drawn])
    assert 0.89 < change.min() < 0.93
    assert 1.07 < change.max() < 1.11


def gradient(size: int = 384) -> Image.Image:
    """Brighter to the right, redder to the bottom."""
    rise = np.linspace(40, 210, size).astype(np.uint8)
    red, green = np.broadcast_to(rise[:, None], (size, size)), np.broadcast_to(rise[None], (size, size))
    return Image.fromarray(np.stack([red, green, green], 2))


def test_rand_augment_leaves_all_else_as_drawn() -> None:
    """Two of three views have no operation that changes something at magnitude 5, and are those without RandAugment."""
    content = jpeg()
    plain = [render(content, TOWER, ViewsConfig(jitter=0.0), (7, view)) for view in range(1, 201)]
    views = ViewsConfig(jitter=0.0, rand_augment=(1, 5))
    drawn = [render(content, TOWER, views, (7, view)) for view in range(1, 201)]
    same = np.mean([np.array_equal(one, other) for one, other in zip(plain, drawn, strict=True)])
    assert 0.6 < same < 0.8
    again = [render(content, TOWER, views, (7, view)) for view in range(1, 201)]
    assert np.array_equal(drawn, again)
    assert np.array_equal(render(content, TOWER, views, (7, 0)), render(content, TOWER, ViewsConfig(), (7, 0)))
    twice = ViewsConfig(jitter=0.0, rand_augment=(2, 5))
    more = [np.array_equal(p, render(content, TOWER, twice, (7, v))) for v, p in enumerate(plain, 1)]
    assert np.mean(more) < same - 0.1


def test_rand_augments_operations_have_blips_ranges() -> None:
    from torchvision.transforms.v2 import functional

    image, grey = gradient(), [128, 128, 128]
    before = np.asarray(image).astype(float)

    def at(place: int, level: float, sign: int = 1) -> np.ndarray:
        return np.asarray(_OPERATIONS[place](image, level, sign)).astype(float)

    identity, contrast, equalize, brightness, sharpness, shear_x, shear_y, translate_x, translate_y, rotate = range(10)
    assert np.array_equal(at(identity, 1.0), before)
    assert np.array_equal(at(contrast, 0.5), np.asarray(functional.autocontrast(image)))
    assert np.array_equal(at(equalize, 0.5), np.asarray(functional.equalize(image)))
    assert at(brightness, 1.0).mean() == pytest.approx((before * 1.9).clip(max=255).mean(), rel=0.01)
    assert at(brightness, 0.0).mean() == pytest.approx((before * 0.1).mean(), rel=0.05)
    assert np.array_equal(at(sharpness, 0.5), before)
    assert np.array_equal(at(translate_x, 0.5)[:, :-5], before[:, 5:])
    assert (at(translate_x, 0.5, -1)[:, :5] == 128).all()
    assert np.array_equal(at(translate_y, 1.0)[:-10], before[10:])
    turned = functional.rotate(image, 15, functional.InterpolationMode.BILINEAR, fill=grey)
    assert np.array_equal(at(rotate, 0.5), np.asarray(turned))
    assert np.allclose(at(shear_x, 0.5)[100, :300], before[100, 15:315], atol=1)  # 0.15 to the side a pixel down
    assert np.allclose(at(shear_y, 0.5)[:300, 100], before[15:315, 100], atol=1)


@pytest.mark.parametrize("wrong", [(0, 5), (2, 11), (2, -1)])
def test_a_wrong_rand_augment_is_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one operation and a magnitude of 0 to 10"):
        ViewsConfig(rand_augment=wrong)
