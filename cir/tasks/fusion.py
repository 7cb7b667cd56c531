"""What a fusion of image and text features gives the training loop: frozen features, and tokens or features of texts."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cir.config import VariantConfig
from cir.tasks.triplets import Gallery, TripletTask
from cluster.config import content_of
from cluster.manifest import digest_of
from mining.embeddings import INFO
from mining.features import ORIGIN, FeatureSource, unit_vectors
from mining.scratch import shared


class FusionTask(TripletTask):
    """Of a fusion: frozen features of images, and tokens or cached features of texts."""

    @staticmethod
    def untrained(content: Mapping[str, Any], config: VariantConfig) -> Any:
        """With its text encoder."""
        from cir.models.composed import ComposedRetrieval
        from mining.texts import load_text_encoder

        assert config.text is not None
        return ComposedRetrieval(config, content["dim"], load_text_encoder(config.text))

    @cached_property
    def _source(self) -> FeatureSource:
        return self.features.open(self._images)

    @cached_property
    def _encoder(self) -> Any:
        from mining.texts import load_text_encoder

        assert self.config.text is not None
        return load_text_encoder(self.config.text)

    @cached_property
    def _text_features(self) -> tuple[dict[str, int], np.ndarray]:
        """Row of each distinct text, and the frozen encoder's features float32 [texts, width]: computed once a node."""
        from cluster.devices import device
        from mining.texts import encode_texts

        assert self.config.text is not None
        texts = sorted({*self._rows.texts.unique().to_pylist(), *self._validation.first()})

        def write(path: Path) -> None:
            with path.open("wb") as file:  # a path's name would get another suffix
                np.save(file, encode_texts(self._encoder, texts, device()).cpu().numpy())

        key = digest_of(["texts", content_of(self.config.text), texts]).encode()
        return {text: i for i, text in enumerate(texts)}, np.load(shared(key, ".npy", write), mmap_mode="r")

    @property
    def _trains_text(self) -> bool:
        return self.config.text is not None and self.config.text.trained

    def build(self) -> Any:
        """A frozen text encoder stays out of the module: its outputs are cached here."""
        from cir.models.composed import ComposedRetrieval

        module = ComposedRetrieval(self.config, self.features.embeddings.read_json(INFO)["dim"], self._encoder)
        if not self._trains_text:
            module.text = None
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
        return self._prepared(self._source.take(image_ids, views), self.features.mean)

    def _held_out_references(self, image_ids: np.ndarray) -> np.ndarray:
        ids, values = self._gallery
        return values[np.searchsorted(ids, image_ids)]

    def _text(self, texts: list[str]) -> Any:
        if self._trains_text:
            return self._encoder.tokenize(texts)
        import torch

        places, features = self._text_features
        return torch.from_numpy(features[[places[text] for text in texts]])
