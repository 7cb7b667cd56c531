"""Images as pixels, for backbones that see with their own image tower."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from cluster.artifacts import Output
from cluster.errors import UserError
from cluster.stage import RunContext, Stage
from mining import tables
from mining.features import Features, FeatureSource, features_of
from mining.gallery import encoded_images
from mining.images import decode

CROP, ASPECT = (0.8, 1.0), (0.9, 1.1)  # share of the area, and change of the aspect (paper, supplement)


@dataclass(frozen=True)
class Images:
    """The pixels of galleries' images; `crop` draws random crops for training. Travels to the workers."""

    galleries: tuple[Output, ...]
    crop: bool = True

    def open(self, image_ids: np.ndarray) -> "DecodedImages":
        """Plain images and, if `crop`, random crops."""
        return DecodedImages(self.galleries, np.unique(image_ids), views=2**31 if self.crop else 1)

    def open_plain(self, image_ids: np.ndarray) -> "DecodedImages":
        """Plain images."""
        return DecodedImages(self.galleries, np.unique(image_ids), views=1)

    def check(self, image_ids: np.ndarray, where: str) -> None:
        """Raises UserError when an image named in `where` is in none of the galleries."""
        known = [gallery.read_parts(tables.GALLERY, ["image_id"])["image_id"] for gallery in self.galleries]
        if len(missing := np.setdiff1d(image_ids, np.concatenate(known))):
            raise UserError(
                f"{where}: {len(missing)} image(s) are in no gallery of {[gallery.uri for gallery in self.galleries]}, such as "
                f"image_id {missing[0]}; take their rows out, or name their gallery"
            )


def images_of(
    run: RunContext, embeddings: Sequence[Stage], galleries: Sequence[Stage], center: Stage | None, crop: bool = True
) -> "ImageSource":
    """What a generator sees of some stages' images: their features where they were embedded, else their pixels."""
    if embeddings:
        return features_of(run, embeddings, galleries, center)
    return Images(tuple(map(run.output, galleries)), crop)


class DecodedImages:
    """Some images as the model's processor takes them."""

    def __init__(self, galleries: tuple[Output, ...], image_ids: np.ndarray, views: int) -> None:
        self.galleries, self.image_ids, self.views = galleries, image_ids, views

    @cached_property
    def _encoded(self) -> Mapping[int, bytes]:
        return encoded_images(self.galleries, self.image_ids)

    def draw_views(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """A fresh crop each time; the plain image is as rare as any other."""
        return rng.integers(self.views, size=count)

    def take(self, image_ids: np.ndarray, views: np.ndarray) -> list[Image.Image]:
        """RGB images: view 0 is plain, any other a random crop that follows from (image_id, view)."""
        taken = []
        for image_id, view in zip(image_ids.tolist(), views.tolist(), strict=True):
            image = decode(self._encoded[image_id])
            taken.append(image if view == 0 else _random_crop(image, np.random.default_rng((image_id, view))))
        return taken


ImageSource = Features | Images  # where a generator's images come from
OpenImages = FeatureSource | DecodedImages  # some of them, as the backbone's `Inputs` take them


def _random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Most of the image, its aspect changed a little: the model's processor resizes it as it does a plain one."""
    area, aspect = rng.uniform(*CROP), np.exp(rng.uniform(*np.log(ASPECT)))
    width = max(1, round(image.width * min(1.0, np.sqrt(area * aspect))))
    height = max(1, round(image.height * min(1.0, np.sqrt(area / aspect))))
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))
