"""Pixels of galleries' images, plain and cropped."""

import numpy as np
import pytest

from cluster.artifacts import Output
from cluster.errors import UserError
from mining.images import decode
from vdg.images import Images

IDS = np.array([3, 0, 3])


def _pixels(images) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


def test_view_zero_is_the_image_itself(gallery, photos):
    source = Images((gallery,)).open(IDS)
    for image, place in zip(_pixels(source.take(IDS, np.zeros(3, int))), IDS, strict=True):
        np.testing.assert_array_equal(image, np.asarray(decode(photos[place][1])))


def test_other_views_are_crops_that_follow_from_image_and_view(gallery, photos):
    source = Images((gallery,)).open(IDS)
    views = np.arange(1, 40)
    crops, again = (_pixels(source.take(np.full(39, 3), views)) for _ in range(2))
    assert all(np.array_equal(left, right) for left, right in zip(crops, again, strict=True))
    whole = decode(photos[3][1])
    shares = np.array([crop.shape[0] * crop.shape[1] / (whole.width * whole.height) for crop in crops])
    aspects = np.array([crop.shape[1] / crop.shape[0] * whole.height / whole.width for crop in crops])
    assert 0.77 < shares.min() < 0.85
    assert shares.max() <= 1
    assert 0.87 < aspects.min() < 1 < aspects.max() < 1.13
    assert len({crop.shape for crop in crops}) > 20


def test_views_are_drawn_only_where_there_are_crops(gallery):
    rng = np.random.default_rng(0)
    assert len(set(Images((gallery,)).open(IDS).draw_views(50, rng).tolist())) == 50
    assert not Images((gallery,), crop=False).open(IDS).draw_views(50, rng).any()
    assert not Images((gallery,)).open_plain(IDS).draw_views(50, rng).any()


def test_an_image_of_no_gallery_is_named(gallery, tmp_path):
    images = Images((gallery,))
    images.check(IDS, "instruct.triplets")
    with pytest.raises(UserError, match=r"instruct\.triplets: 1 image.* 99"):
        images.check(np.array([0, 99]), "instruct.triplets")
    with pytest.raises(KeyError):
        Images((Output(str(tmp_path / "none")),)).open(IDS).take(IDS, np.zeros(3, int))
