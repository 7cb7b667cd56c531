"""The generator at work on single pairs: what it writes of them, and how sure it is."""

from dataclasses import dataclass
from threading import Lock
from typing import Any

from cluster.artifacts import Output
from vdg.config import GenerateConfig
from vdg.description import read_description


@dataclass(frozen=True)
class Explanation:
    """What the generator says turns a reference into a candidate."""

    delta: str
    log_probability: float  # mean of its tokens, in nats


class Explainer:
    """A trained generator, loaded when it is first asked; one pair at a time."""

    def __init__(self, model: Output, config: GenerateConfig) -> None:
        """Raises UserError when the model is no trained generator, or what it is built on is not on this machine."""
        self.model, self.vdg = model, read_description(model).vdg
        if (weights := self.vdg.source[1]) is not None:
            weights.location()
        self._config = config.model_copy(update={"greedy": True})
        self._turn = Lock()
        self._loaded: Any = None

    def explain(self, reference: Any, candidate: Any) -> Explanation:
        """Of two images as the backbone takes them: features float32 [tokens, dim], or RGB images."""
        with self._turn:
            if self._loaded is None:
                from vdg.backbones import load_generator

                self._loaded = load_generator(self.model, self._config.precision)
            generator, inputs = self._loaded
            batch = inputs.pairs(*(image[None] if hasattr(image, "shape") else [image] for image in (reference, candidate)))
            (delta,), (score,) = generator.generate(batch, self._config, seed=0)
        return Explanation(delta, score)
