"""The training tasks of both stages: which texts and views of images a step draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load

from cluster.artifacts import Output
from cluster.config import TrainingConfig
from cluster.devices import uses_bf16
from cluster.training.checkpoints import WEIGHTS
from mining import tables
from mining.features import Features, FeatureSource
from vdg.backbones import build, make_inputs
from vdg.backbones.base import IGNORED, Backbone, Batch, Inputs
from vdg.backbones.features import FeatureBackbone, FeatureInputs
from vdg.config import AlignConfig, Description, InstructConfig
from vdg.images import ImageSource, OpenImages
from vdg.prompts import INSTRUCTIONS

VALIDATION_BATCH = 32


def _build(description: Description, training: TrainingConfig) -> Backbone:
    """The generator to train, its frozen model in the precision and over the ranks that training says."""
    dtype = torch.bfloat16 if uses_bf16(training.precision) else torch.float32
    return build(description, dtype, partitioned=training.zero_stage == 3)


@dataclass
class AlignTask:
    """Stage 1: caption single images; the projection alone is trained."""

    features: Features
    captions: Output
    description: Description
    config: AlignConfig
    best_metric: str | None = None

    @cached_property
    def _table(self) -> pa.Table:
        return self.captions.read_parts(tables.CAPTIONS)

    @cached_property
    def _source(self) -> FeatureSource:
        return self.features.open(self._table["image_id"].to_numpy())

    @cached_property
    def _inputs(self) -> FeatureInputs:
        return FeatureInputs(self.description, self._source.mean, self.config.max_tokens)

    @property
    def size(self) -> int:
        """Number of captions."""
        return len(self._table)

    def build(self) -> Backbone:
        """The generator without LoRA."""
        return _build(self.description, self.config.training)

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """Captions of `rows`, each with a random view of its image and a random instruction."""
        chosen = self._table.take(rows)
        values = self._source.take(chosen["image_id"].to_numpy(), self._source.draw_views(len(rows), rng))
        return self._inputs.captions(values, rng.integers(len(INSTRUCTIONS), size=len(rows)), chosen["caption"].to_pylist())

    def validate(self, module: Any) -> dict[str, float]:
        """Nothing: alignment is judged by what instruction makes of it."""
        return {}


@dataclass
class InstructTask:
    """Stage 2: write the delta of a triplet; projection and LoRA are trained, some triplets held out."""

    images: ImageSource
    triplets: Output
    aligned: Output | None
    description: Description
    config: InstructConfig

    @property
    def best_metric(self) -> str | None:
        """The validation loss where triplets are held out."""
        return "negative_val_loss" if len(self._validation) else None

    @cached_property
    def _table(self) -> pa.Table:
        return self.triplets.read_parts(tables.TRIPLETS, ["triplet_id", "reference_id", "target_id", "deltas"])

    @cached_property
    def _held_out(self) -> np.ndarray:
        """Mask [triplets] by a hash of the triplet's id: a triplet keeps its side when others come or go."""
        shares = [tables.stable_id("held out", i) / 2**63 for i in self._table["triplet_id"].to_pylist()]
        return np.array(shares) < self.config.held_out

    @cached_property
    def _training(self) -> pa.Table:
        return self._table.filter(pa.array(~self._held_out))

    @cached_property
    def _validation(self) -> pa.Table:
        return self._table.filter(pa.array(self._held_out))

    @cached_property
    def _source(self) -> OpenImages:
        return self.images.open(tables.images_of(self._table))

    @cached_property
    def _inputs(self) -> Inputs:
        return make_inputs(self.description, getattr(self._source, "mean", None), self.config.max_tokens)

    @property
    def size(self) -> int:
        """Number of training triplets."""
        return len(self._training)

    def build(self) -> Backbone:
        """The generator with fresh LoRA and, where there is one, the aligned projection."""
        generator = _build(self.description, self.config.training)
        if self.aligned is not None:
            assert isinstance(generator, FeatureBackbone)
            weights = load(self.aligned.read_bytes(WEIGHTS))
            generator.projection.load_state_dict({name.removeprefix("projection."): w for name, w in weights.items()})
        return generator

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """Triplets of `rows`, each with a random view of both images and one of its deltas."""
        chosen = self._training.take(rows)
        views = self._source.draw_views(2 * len(rows), rng)
        return self._pairs(chosen, views, [texts[rng.integers(len(texts))] for texts in chosen["deltas"].to_pylist()])

    def _pairs(self, chosen: pa.Table, views: np.ndarray, deltas: Sequence[str]) -> Batch:
        references, targets = (
            self._source.take(chosen[name].to_numpy(), seen)
            for name, seen in zip(("reference_id", "target_id"), np.split(views, 2), strict=True)
        )
        return self._inputs.pairs(references, targets, deltas)

    def validate(self, module: Any) -> dict[str, float]:
        """Negative mean loss a token over the held-out triplets: plain views, every triplet's first delta."""
        device = next(module.parameters()).device
        total, tokens = 0.0, 0
        for batch in self._validation_batches():
            count = int((batch["targets"] != IGNORED).sum())
            total += float(module({name: value.to(device) for name, value in batch.items()})["loss"]) * count
            tokens += count
        return {"negative_val_loss": -total / tokens} if tokens else {}

    def _validation_batches(self) -> Iterator[Batch]:
        for first in range(0, len(self._validation), VALIDATION_BATCH):
            chosen = self._validation.slice(first, VALIDATION_BATCH)
            yield self._pairs(chosen, np.zeros(2 * len(chosen), np.int64), [t[0] for t in chosen["deltas"].to_pylist()])
