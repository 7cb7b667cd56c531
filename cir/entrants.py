"""What can be ranked on a benchmark: trained models, control rows that need no training, and given embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cir.benchmarks.benchmark import Query
from cir.compose import Composer
from cir.metrics import unit
from cir.vectors import Given, Take
from cluster.artifacts import Output
from mining.config import TextTower

Prepare = Callable[[np.ndarray], np.ndarray]  # image vectors float32 [n, dim] to those that are compared
Kind = Literal["image_only", "text_only", "sum"]
TEXT_LEFT_OUT = "the text encoder and the image tower are not the two sides of one model (open_clip, the same weights)"
GIVEN_TEXT_LEFT_OUT = "the file of embeddings has no vectors of the texts alone"


@dataclass(frozen=True)
class Trained:
    """A trained model, and where the references' features and pixels are."""

    model: Output
    embeddings: Output
    gallery: Output

    def compose(self, queries: tuple[Query, ...], take: Take, batch_size: int) -> tuple[np.ndarray, Prepare]:
        """Query vectors float32 [queries, dim], and what makes a gallery's vectors comparable with them.

        `take` gives the raw vectors of the images that the queries name.
        """
        texts = [query.text for query in queries]
        composer = Composer(self.model, self.embeddings, self.gallery, texts)
        return composer.queries(_references(queries), texts, batch_size), composer.prepare


@dataclass(frozen=True)
class Control:
    """The reference's own vector, the text's, or the sum of both at norm 1, as the frozen towers give them."""

    kind: Kind
    text: TextTower | None = None

    def compose(self, queries: tuple[Query, ...], take: Take, batch_size: int) -> tuple[np.ndarray, Prepare]:
        """As `Trained`; images are compared raw."""
        composed = []
        if self.kind != "text_only":
            composed.append(unit(take(_references(queries))))
        if self.kind != "image_only":
            from mining.texts import KnownTexts

            assert self.text is not None
            texts = [query.text for query in queries]
            composed.append(unit(KnownTexts(self.text, texts).tokenize(texts).numpy()))
        return np.sum(composed, axis=0), lambda values: values


@dataclass(frozen=True)
class GivenQueries:
    """The query vectors of a file."""

    vectors: Given

    def compose(self, queries: tuple[Query, ...], take: Take, batch_size: int) -> tuple[np.ndarray, Prepare]:
        """As `Trained`; images are compared raw."""
        return self.vectors.queries([query.key for query in queries]), lambda values: values


Entrant = Trained | Control | GivenQueries  # travels to a Ray task


def controls(text: TextTower | None, given: bool = False) -> tuple[dict[str, Entrant], dict[str, str]]:
    """The control rows that can be ranked, and why others cannot.

    `text`: the encoder whose vectors can be compared with the gallery's, if there is one.
    """
    rows: dict[str, Entrant] = {"image_only": Control("image_only")}
    if text is None:
        return rows, dict.fromkeys(("text_only", "sum"), GIVEN_TEXT_LEFT_OUT if given else TEXT_LEFT_OUT)
    return rows | {"text_only": Control("text_only", text), "sum": Control("sum", text)}, {}


def _references(queries: tuple[Query, ...]) -> np.ndarray:
    return np.array([query.reference for query in queries], np.int64)
