"""Batches for both training stages: draws of views and texts, prepared features, token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load
from torch import Tensor

from cluster.artifacts import Output
from cluster.devices import uses_bf16
from cluster.training import WEIGHTS, TrainingConfig
from mining import tables
from mining.features import Features, FeatureSource, centred
from vdg.config import AlignConfig, InstructConfig, Stage, VdgConfig
from vdg.language import load_tokenizer
from vdg.model import IGNORED, VisualDeltaGenerator
from vdg.prompts import INSTRUCTIONS, answer_ids, caption_prompt, pair_prompt

VALIDATION_BATCH = 32


def prepare(values: np.ndarray, mean: np.ndarray, vdg: VdgConfig) -> Tensor:
    """The projection's input float32 from raw features [..., dim]: centred to norm sqrt(dim) if the config says so."""
    if vdg.center:
        values = centred(values, mean) * np.sqrt(values.shape[-1], dtype=np.float32)
    return torch.from_numpy(values)


def collate(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, Tensor]:
    """Right-padded `ids` and `targets` [B, T]: each position's target is the id after it, where that is the answer's."""
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) - 1
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer) - 1
        ids[row, :end] = torch.tensor(prompt + answer[:-1])
        targets[row, len(prompt) - 1 : end] = torch.tensor(answer)
    return {"ids": ids, "targets": targets}


def _generator(vdg: VdgConfig, dim: int, stage: Stage, training: TrainingConfig) -> VisualDeltaGenerator:
    """The generator to train, its frozen language model in the precision and over the ranks that training says."""
    dtype = torch.bfloat16 if uses_bf16(training.precision) else torch.float32
    return VisualDeltaGenerator(vdg, dim, stage, dtype, partitioned=training.zero_stage == 3)


@dataclass
class AlignTask:
    """Stage 1: caption single images; the projection alone is trained."""

    features: Features
    captions: Output
    vdg: VdgConfig
    config: AlignConfig
    best_metric: str | None = None

    @cached_property
    def _table(self) -> pa.Table:
        return self.captions.read_parts(tables.CAPTIONS)

    @cached_property
    def _source(self) -> FeatureSource:
        return self.features.open(self._table["image_id"].to_numpy())

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.vdg.language_model)

    @cached_property
    def _prompts(self) -> list[list[int]]:
        slots = self._source.tokens * self.vdg.tokens_per_feature
        return [caption_prompt(self._tokenizer, self.vdg.prompt, slots, text) for text in INSTRUCTIONS]

    @property
    def size(self) -> int:
        """Number of captions."""
        return len(self._table)

    def build(self) -> VisualDeltaGenerator:
        """The generator without LoRA."""
        return _generator(self.vdg, self._source.dim, "align", self.config.training)

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """Captions of `rows`, each with a random view of its image and a random instruction."""
        chosen = self._table.take(rows)
        images, source = chosen["image_id"].to_numpy(), self._source
        values = source.take(images, source.draw_views(len(rows), rng))
        prompts = [self._prompts[i] for i in rng.integers(len(self._prompts), size=len(rows))]
        answers = [answer_ids(self._tokenizer, text, self.config.max_tokens) for text in chosen["caption"].to_pylist()]
        return {"features": prepare(values, source.mean, self.vdg).unsqueeze(1), **collate(prompts, answers)}

    def validate(self, module: Any) -> dict[str, float]:
        """Nothing: alignment is judged by what instruction makes of it."""
        return {}


@dataclass
class InstructTask:
    """Stage 2: write the delta of a triplet; projection and LoRA are trained, some triplets held out."""

    features: Features
    triplets: Output
    aligned: Output | None
    vdg: VdgConfig
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
    def _source(self) -> FeatureSource:
        columns = [self._table[name].to_numpy() for name in ("reference_id", "target_id")]
        return self.features.open(np.concatenate(columns))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.vdg.language_model)

    @cached_property
    def _prompt(self) -> list[int]:
        return pair_prompt(self._tokenizer, self.vdg.prompt, self._source.tokens * self.vdg.tokens_per_feature)

    @property
    def size(self) -> int:
        """Number of training triplets."""
        return len(self._training)

    def build(self) -> VisualDeltaGenerator:
        """The generator with fresh LoRA and, where there is one, the aligned projection."""
        generator = _generator(self.vdg, self._source.dim, "instruct", self.config.training)
        if self.aligned is not None:
            generator.projection.load_state_dict({"weight": load(self.aligned.read_bytes(WEIGHTS))["projection.weight"]})
        return generator

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """Triplets of `rows`, each with a random view of both images and one of its deltas."""
        chosen = self._training.take(rows)
        views = self._source.draw_views(2 * len(rows), rng)
        return self._inputs(chosen, views, [texts[rng.integers(len(texts))] for texts in chosen["deltas"].to_pylist()])

    def _inputs(self, chosen: pa.Table, views: np.ndarray, deltas: Sequence[str]) -> dict[str, Tensor]:
        images = np.concatenate([chosen[name].to_numpy() for name in ("reference_id", "target_id")])
        values = prepare(self._source.take(images, views), self._source.mean, self.vdg)
        answers = [answer_ids(self._tokenizer, text, self.config.max_tokens) for text in deltas]
        features = torch.stack(values.split(len(chosen)), 1)
        return {"features": features, **collate([self._prompt] * len(chosen), answers)}

    def validate(self, module: Any) -> dict[str, float]:
        """Negative mean loss a token over the held-out triplets: plain views, every triplet's first delta."""
        device = next(module.parameters()).device
        total, tokens = 0.0, 0
        for batch in self._validation_batches():
            count = int((batch["targets"] != IGNORED).sum())
            total += float(module({name: value.to(device) for name, value in batch.items()})["loss"]) * count
            tokens += count
        return {"negative_val_loss": -total / tokens} if tokens else {}

    def _validation_batches(self) -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(self._validation), VALIDATION_BATCH):
            chosen = self._validation.slice(first, VALIDATION_BATCH)
            yield self._inputs(chosen, np.zeros(2 * len(chosen), np.int64), [t[0] for t in chosen["deltas"].to_pylist()])
