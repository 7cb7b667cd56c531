"""How MLflow loads a model of its registry: from its output, by URI and digest.

model = mlflow.pyfunc.load_model("models:/vdg.semi.s0@run-demo")
model.predict(pandas.DataFrame({"image": ["photo.jpg"], "text": ["the same in green"]}))
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cir.search import Model
from cluster.app.export import tower_of
from cluster.driver.lineage import Lineage, problems
from cluster.errors import UserError
from mining.images import decode

if TYPE_CHECKING:
    import pandas as pd


class Registered:
    """A retrieval model as MLflow asks it."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, table: "pd.DataFrame", params: Any = None) -> np.ndarray:
        """float32 [n, dim] of norm 1: of an image (a file, or its bytes) and a text the query, without a text what is searched.

        Raises Rejected for what is no image.
        """
        vectors = []
        for image, text in zip(table["image"], table["text"], strict=True):
            decoded = decode(image if isinstance(image, bytes) else Path(image).read_bytes())
            has_text = isinstance(text, str) and text  # pandas has several ways to say that there is none
            vectors.append(self.model.query(decoded, text) if has_text else self.model.images([decoded])[0])
        return np.stack(vectors)


def _load_pyfunc(path: str) -> Registered:
    """For `mlflow.pyfunc`. Raises UserError when the output is not there, has changed, or nothing says where its tower is."""
    place = json.loads(Path(path).read_text())
    base, mark, query = place["uri"].partition("?")
    lineage = Lineage(base.rsplit("/", 2)[0] + mark + query)
    found = lineage.find(place["digest"])
    if not found:
        raise UserError(f"{place['uri']}: is not there; MLflow has a model's place and digest alone, not its weights")
    if changed := problems(found[0]):
        raise UserError(f"{changed[0]}; a model that is not the one that was registered is not loaded")
    tower = tower_of(lineage, found[0])
    if tower is None:
        raise UserError(f"{place['uri']}: no config below {lineage.root}/runs says where the weights of its image tower are")
    return Registered(Model(found[0].output, tower))
