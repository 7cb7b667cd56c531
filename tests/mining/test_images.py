from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mining.config import TowerConfig, ViewsConfig
from mining.images import BadImage, decode, render

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
    with pytest.raises(BadImage) as error:
        decode(content, max_pixels=100_000)
    assert error.value.reason == reason


def test_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    stream = BytesIO()
    Image.new("1", (20_000, 20_000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 100_000
    with pytest.raises(BadImage, match="too_large"):
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
    np.random.default_rng().random()
    assert np.array_equal(first, render(jpeg(), TOWER, ViewsConfig(count=5), (7, 1)))
    assert not np.array_equal(first, render(jpeg(), TOWER, ViewsConfig(count=5), (7, 2)))
    assert not np.array_equal(first, render(jpeg(), TOWER, ViewsConfig(count=5), (8, 1)))


def test_grey_and_transparent_images_become_rgb() -> None:
    for mode in ("L", "RGBA", "P"):
        stream = BytesIO()
        Image.new(mode, (30, 30)).save(stream, "PNG")
        assert decode(stream.getvalue()).mode == "RGB"
