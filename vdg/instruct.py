"""The stage instruct (stage 2): projection and LoRA learn to write the delta of a triplet (paper, Algorithm 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import WARNINGS, Output
from cluster.config import WorkerResources, content_of
from cluster.errors import UserError
from cluster.stage import LOOKED_UP, RunContext, Stage
from cluster.training.checkpoints import WEIGHTS
from cluster.training.loop import train, unfit, unlearned
from mining import tables
from vdg.align import require_rows
from vdg.config import InstructConfig, VdgConfig
from vdg.description import Description, describe, read_description, write_description
from vdg.images import ImageSource, OpenImages, images_of

if TYPE_CHECKING:
    from vdg.backbones.base import Backbone, Batch, Inputs

VALIDATION_BATCH = 32


@dataclass(frozen=True, eq=False, kw_only=True)
class Instruct(Stage):
    """`instruct:vdg`: the generator's weights, from the aligned projection where there is one, and what builds it again."""

    version = 4
    model = "visual delta generator"
    triplets: Stage
    embeddings: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of the triplets' images, where a tower sees them
    galleries: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of those images, where pixels are seen in training
    center: Stage | None = None  # of features
    aligned: Stage | None = None
    vdg: VdgConfig
    instruct: InstructConfig
    seed: int
    resources: WorkerResources

    def check(self) -> dict[str, str]:
        """A batch has to divide over the workers."""
        return super().check() | unfit("instruct.training", self.instruct.training, self.resources)

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError before anything is loaded when an image is missing or the aligned projection does not fit."""
        triplets = run.output(self.triplets)
        images = images_of(run, self.embeddings, self.galleries, self.center, self.instruct.crop)
        require_rows(triplets, "triplets")
        images.check(tables.images_in(triplets, tables.TRIPLETS), f"instruct.triplets ({triplets.uri})")
        deltas = chain.from_iterable(triplets.read_parts(tables.TRIPLETS, ["deltas"])["deltas"].to_pylist())
        description = describe("instruct", images, self.vdg, deltas)
        write_description(output, description, images)
        aligned = run.output(self.aligned) if self.aligned else None
        if aligned is not None:
            _check_aligned(read_description(aligned), description)
        task = InstructTask(images, triplets, aligned, description, self.instruct)
        train(output, task, self.instruct.training, self.seed, self.resources, run.monitor, run.groups)
        output.write_json(WARNINGS, unlearned(output))


def _check_aligned(aligned: Description, now: Description) -> None:
    """Raises UserError naming the first setting in which the aligned projection does not fit this model."""
    trained, wanted = content_of(aligned.vdg), content_of(now.vdg)
    for name in ("language_model", "projection", "tokens_per_feature", "center"):
        before, after = trained[name], wanted[name]
        if before != after:
            raise UserError(f"vdg.{name}: {after}, but the aligned projection was trained with {before}; run align again")
    if aligned.dim != now.dim:
        raise UserError(f"features are {now.dim} wide, the aligned projection takes {aligned.dim}; use the same image tower")


@dataclass
class InstructTask:
    """What the training loop draws: triplets, of which some are held out."""

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
    def _inputs(self) -> "Inputs":
        from vdg.backbones import make_inputs

        return make_inputs(self.description, getattr(self.images, "mean", None), self.config.max_tokens)

    @property
    def size(self) -> int:
        """Number of training triplets."""
        return len(self._training)

    def build(self) -> "Backbone":
        """The generator with fresh LoRA and, where there is one, the aligned projection."""
        from safetensors.torch import load

        from vdg.backbones import build_for_training

        generator = build_for_training(self.description, self.config.training)
        if self.aligned is not None:
            weights = load(self.aligned.read_bytes(WEIGHTS))
            projection: Any = generator.projection
            projection.load_state_dict({name.removeprefix("projection."): w for name, w in weights.items()})
        return generator

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> "Batch":
        """Triplets of `rows`, each with a random view of both images and one of its deltas."""
        chosen = self._training.take(rows)
        views = self._source.draw_views(2 * len(rows), rng)
        return self._pairs(chosen, views, [texts[rng.integers(len(texts))] for texts in chosen["deltas"].to_pylist()])

    def _pairs(self, chosen: pa.Table, views: np.ndarray, deltas: Sequence[str]) -> "Batch":
        references, targets = (
            self._source.take(chosen[name].to_numpy(), seen)
            for name, seen in zip(("reference_id", "target_id"), np.split(views, 2), strict=True)
        )
        return self._inputs.pairs(references, targets, deltas)

    def validate(self, module: Any) -> dict[str, float]:
        """Negative mean loss a token over the held-out triplets: plain views, every triplet's first delta."""
        from vdg.backbones.base import IGNORED

        device = next(module.parameters()).device
        total, tokens = 0.0, 0
        for first in range(0, len(self._validation), VALIDATION_BATCH):
            chosen = self._validation.slice(first, VALIDATION_BATCH)
            plain, deltas = np.zeros(2 * len(chosen), np.int64), [texts[0] for texts in chosen["deltas"].to_pylist()]
            batch = self._pairs(chosen, plain, deltas)
            count = int((batch["targets"] != IGNORED).sum())
            total += float(module({name: value.to(device) for name, value in batch.items()})["loss"]) * count
            tokens += count
        return {"negative_val_loss": -total / tokens} if tokens else {}
