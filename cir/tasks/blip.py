"""What composed retrieval with BLIP gives the training loop: triplets joined with pixels, which its ViT sees online."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from cir.config import VariantConfig
from cir.tasks.triplets import TripletTask
from mining.config import TowerConfig
from mining.features import AugmentedViews
from mining.pretrained import tokenizer_of, tokens_of


class BlipTask(TripletTask):
    """Of BLIP: pixels of fresh views of images, and tokens of texts. Validation compares with cached features."""

    sees_pixels = True

    @staticmethod
    def untrained(content: Mapping[str, Any], config: VariantConfig, texts: Iterable[str] | None = None) -> Any:
        """BLIP whole, with the weights of its tower."""
        from cir.models.blip import BlipRetrieval

        return BlipRetrieval(config, TowerConfig.model_validate(content["tower"]))

    @cached_property
    def _pixels(self) -> AugmentedViews:
        """Of the images that are trained on and of the held-out references."""
        assert self.features.online is not None, "BLIP sees images: the features name their galleries"
        return AugmentedViews(self.features.online, np.union1d(self._images, self._validation.reference_ids))

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.features.online is not None
        assert self.features.online.tower.weights is not None
        return tokenizer_of(self.features.online.tower.weights)

    def build(self) -> Any:
        """BLIP whole, its frozen parts included."""
        from cir.models.blip import BlipRetrieval

        assert self.features.online is not None
        return BlipRetrieval(self.config, self.features.online.tower)

    def _drawn(self, image_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self._pixels.take(image_ids, self._pixels.draw_views(len(image_ids), rng))

    def _plain(self, image_ids: np.ndarray) -> np.ndarray:
        return self._pixels.take(image_ids, np.zeros(len(image_ids), np.int64))

    def _text(self, texts: list[str]) -> Any:
        from cir.models.blip import MAX_LENGTH

        return tokens_of(self._tokenizer, texts, MAX_LENGTH)
