"""A trained model at work: its queries of references and deltas, and gallery features as it compares them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cir.config import VariantConfig
from cir.train import MODEL
from cluster.artifacts import Output
from mining.config import TowerConfig, ViewsConfig
from mining.features import Features, Online, Pixels, centred, read_mean

if TYPE_CHECKING:
    from cir.models.retrieval import Retrieval


def load_cir(model: Output) -> "Retrieval":
    """A trained model on the CPU, ready to compose queries."""
    from safetensors.torch import load

    from cluster.training import WEIGHTS, load_trained

    module = _untrained(model)
    load_trained(module, load(model.read_bytes(WEIGHTS)))
    return module.eval()


def _untrained(model: Output) -> "Retrieval":
    content, config = model.read_json(MODEL), _config(model)
    if config.model == "blip":
        from cir.models.blip import BlipRetrieval

        return BlipRetrieval(config, TowerConfig.model_validate(content["tower"]))
    from cir.models.composed import ComposedRetrieval
    from cir.models.text import load_text_encoder

    assert config.text is not None
    return ComposedRetrieval(config, content["dim"], load_text_encoder(config.text))


def _config(model: Output) -> VariantConfig:
    return VariantConfig.model_validate(model.read_json(MODEL)["config"])


def target_side(model: Output) -> Callable[[np.ndarray], np.ndarray]:
    """What turns cached features [n, 1, dim] into those [n, dim] that the model's queries are compared with.

    They are centred with the mean of the gallery that the model was trained on, when its config says so.
    """
    mean = read_mean(model) if _config(model).center else None

    def prepared(values: np.ndarray) -> np.ndarray:
        vectors = values[:, 0].astype(np.float32)
        return vectors if mean is None else centred(vectors, mean)

    return prepared


def compose_queries(
    model: Output,
    embeddings: Output,
    galleries: tuple[Output, ...],
    reference_ids: np.ndarray,
    texts: list[str],
    batch_size: int,
) -> np.ndarray:
    """Queries float32 [n, dim] of a trained model for references (ids [n]) and deltas, on this process's device.

    A fusion takes the references' plain features from `embeddings`, BLIP their pixels from the images of `galleries`.
    """
    import torch

    from cluster.devices import device

    module, place = load_cir(model).to(device()), device()
    take = _reference_inputs(model, embeddings, galleries, reference_ids)
    queries = []
    with torch.inference_mode():
        for rows in (slice(i, i + batch_size) for i in range(0, len(texts), batch_size)):
            reference = torch.from_numpy(take(reference_ids[rows])).to(place)
            queries.append(module.compose(reference, module.tokenize(texts[rows]).to(place)).cpu().numpy())
    return np.concatenate(queries)


def _reference_inputs(
    model: Output, embeddings: Output, galleries: tuple[Output, ...], image_ids: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the plain inputs of a model for some of these images."""
    if _config(model).model == "blip":
        tower = TowerConfig.model_validate(model.read_json(MODEL)["tower"])
        pixels = Pixels(Online(galleries, tower, ViewsConfig()), image_ids)
        return lambda ids: pixels.take(ids, np.zeros(len(ids), np.int64))
    source, prepared = Features(embeddings).open_plain(image_ids), target_side(model)
    return lambda ids: prepared(source.take(ids, np.zeros(len(ids), np.int64)))
