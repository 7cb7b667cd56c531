"""A trained model at work: its queries of references and deltas, and gallery features as it compares them."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from cir.config import VariantConfig
from cir.tasks import TASKS
from cir.train import MODEL
from cluster.artifacts import Output
from mining.config import TowerConfig, ViewsConfig
from mining.features import AugmentedViews, Features, Online, centred, read_mean

if TYPE_CHECKING:
    from cir.models.retrieval import Retrieval


def load_cir(model: Output, texts: Iterable[str] | None = None) -> "Retrieval":
    """A trained model on the CPU, ready to compose queries; of `texts` alone, if they are given."""
    from safetensors.torch import load

    from cluster.training.checkpoints import WEIGHTS, load_trained

    config = _config(model)
    module: Retrieval = TASKS[config.model].untrained(model.read_json(MODEL), config, texts)
    load_trained(module, load(model.read_bytes(WEIGHTS)))
    return module.eval()


def _config(model: Output) -> VariantConfig:
    return VariantConfig.model_validate(model.read_json(MODEL)["config"])


def target_side(model: Output) -> Callable[[np.ndarray], np.ndarray]:
    """What turns raw image vectors float32 [n, dim] into those that the model's queries are compared with.

    They are centred with the mean that the model was trained with, when its config says so.
    """
    if not _config(model).center:
        return lambda values: values
    mean = read_mean(model)
    return lambda values: centred(values, mean)


class Composer:
    """A trained model on this process's device, composing queries.

    A model takes the references' plain features from `embeddings`, or their pixels from the images of `gallery`. If all
    `texts` that will come are given, those that a frozen encoder reads are encoded once a node.
    """

    def __init__(self, model: Output, embeddings: Output, gallery: Output, texts: Iterable[str] | None = None) -> None:
        from cluster.devices import device

        self.model, self.embeddings, self.gallery = model, embeddings, gallery
        self.module, self.device = load_cir(model, texts).to(device()), device()
        self.takes_pixels = TASKS[_config(model).model].sees_pixels  # as references
        self.prepare = target_side(model)

    def queries(self, reference_ids: np.ndarray, texts: list[str], batch_size: int) -> np.ndarray:
        """Queries float32 [n, dim] for references (ids [n]) and deltas. Rows of one delta go together: it is encoded once."""
        take, order = self._references(reference_ids), np.array(sorted(range(len(texts)), key=texts.__getitem__))
        batches = np.split(order, range(batch_size, len(order), batch_size))
        queries = [self.compose(take(reference_ids[rows]), [texts[row] for row in rows]) for rows in batches]
        return np.concatenate(queries)[np.argsort(order)]

    def compose(self, references: np.ndarray, texts: list[str]) -> np.ndarray:
        """Queries float32 [n, dim] of one batch, from references as the model takes them: see `takes_pixels`.

        They are pixels uint8 [n, size, size, 3], or plain features float32 [n, dim] that went through `prepare`.
        """
        import torch

        with torch.inference_mode():
            tokens = self.module.tokenize(texts).to(self.device)
            return self.module.compose(torch.from_numpy(references).to(self.device), tokens).cpu().numpy()

    def _references(self, image_ids: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What gives the model's plain inputs of some of these images."""
        if self.takes_pixels:
            tower = TowerConfig.model_validate(self.model.read_json(MODEL)["tower"])
            pixels = AugmentedViews(Online((self.gallery,), tower, ViewsConfig()), image_ids)
            return lambda ids: pixels.take(ids, np.zeros(len(ids), np.int64))
        source = Features(self.embeddings).open_plain(image_ids)
        return lambda ids: self.prepare(source.take(ids, np.zeros(len(ids), np.int64))[:, 0])
