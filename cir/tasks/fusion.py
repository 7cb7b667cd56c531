"""What a fusion of image and text features gives the training loop: frozen features, and tokens or features of texts."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from cir.config import VariantConfig
from cir.tasks.triplets import Gallery, TripletTask
from mining.embeddings import INFO
from mining.features import ORIGIN, FeatureSource, unit_vectors


class FusionTask(TripletTask):
    """Of a fusion: frozen features of images, and tokens or cached features of texts."""

    @staticmethod
    def untrained(content: Mapping[str, Any], config: VariantConfig, texts: Iterable[str] | None = None) -> Any:
        """With its text encoder, or what that makes of `texts`."""
        from cir.models.composed import ComposedRetrieval
        from mining.texts import encoder_of

        assert config.text is not None
        return ComposedRetrieval(config, content["dim"], encoder_of(config.text, texts))

    @cached_property
    def _source(self) -> FeatureSource:
        return self.features.open(self._images)

    @cached_property
    def _encoder(self) -> Any:
        from mining.texts import encoder_of

        assert self.config.text is not None
        return encoder_of(self.config.text, [*self._rows.texts.unique().to_pylist(), *self._validation.first()])

    def build(self) -> Any:
        """Features stand for a frozen text encoder."""
        from cir.models.composed import ComposedRetrieval

        module = ComposedRetrieval(self.config, self.features.embeddings.read_json(INFO)["dim"], self._encoder)
        if self.gallery is not None:
            module.hold_unlabelled(*self._unlabelled(self.gallery))
        return module

    def _unlabelled(self, gallery: Gallery) -> tuple[np.ndarray, np.ndarray]:
        """Ids and unit vectors of as many images as the loss asks for, always the same ones."""
        mean = self.features.mean if self.config.center else ORIGIN
        ids, vectors = unit_vectors(gallery.embeddings, mean, gallery.mineable)
        count = min(self.config.loss.unlabelled, len(ids))
        rows = np.sort(np.random.default_rng(0).choice(len(ids), count, replace=False))
        return ids[rows], vectors[rows]

    def _drawn(self, image_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self._taken(image_ids, self._source.draw_views(len(image_ids), rng))

    def _plain(self, image_ids: np.ndarray) -> np.ndarray:
        return self._taken(image_ids, np.zeros(len(image_ids), np.int64))

    def _taken(self, image_ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        return self._prepared(self._source.take(image_ids, views))

    def _held_out_references(self, image_ids: np.ndarray) -> np.ndarray:
        ids, values = self._gallery
        return values[np.searchsorted(ids, image_ids)]

    def _text(self, texts: list[str]) -> Any:
        return self._encoder.tokenize(texts)
