"""A trained model's queries."""

from typing import TYPE_CHECKING

import numpy as np

from cir.config import VariantConfig
from cir.train import MODEL
from cluster.artifacts import Output

if TYPE_CHECKING:
    from cir.models.composed import ComposedRetrieval


def load_cir(output: Output) -> "ComposedRetrieval":
    """A trained model on the CPU, ready to compose queries. Its features are centred with the output's own mean."""
    from safetensors.torch import load

    from cir.models.composed import ComposedRetrieval
    from cir.models.text import load_text_encoder
    from cluster.training import WEIGHTS, load_trained

    content = output.read_json(MODEL)
    config = VariantConfig.model_validate(content["config"])
    module = ComposedRetrieval(config, content["dim"], load_text_encoder(config.text))
    load_trained(module, load(output.read_bytes(WEIGHTS)))
    return module.eval()


def compose_queries(module: "ComposedRetrieval", references: np.ndarray, texts: list[str], batch_size: int) -> np.ndarray:
    """Queries float32 [n, dim] from the references' features [n, dim]."""
    import torch

    from cluster.devices import device

    module.to(device())
    assert module.text is not None
    queries = []
    with torch.inference_mode():
        for i in range(0, len(texts), batch_size):
            tokens = module.text.tokenize(texts[i : i + batch_size]).to(device())
            reference = torch.from_numpy(references[i : i + batch_size]).to(device())
            queries.append(module.compose(reference, tokens).cpu().numpy())
    return np.concatenate(queries)
