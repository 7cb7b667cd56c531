"""The stage align (stage 1): the projection alone learns to caption single images (paper, Eq. 1 and Algorithm 1)."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import WARNINGS, Output
from cluster.config import WorkerResources
from cluster.errors import UserError
from cluster.stage import LOOKED_UP, RunContext, Stage
from cluster.training.loop import train, unfit, unlearned
from mining import tables
from mining.features import Features, FeatureSource, features_of
from vdg.config import AlignConfig, VdgConfig
from vdg.description import Description, describe, write_description
from vdg.prompts import INSTRUCTIONS

if TYPE_CHECKING:
    from vdg.backbones.base import Backbone, Batch
    from vdg.backbones.features import FeatureInputs


@dataclass(frozen=True, eq=False, kw_only=True)
class Align(Stage):
    """`align:vdg`: the weights of the projection, and what builds it again."""

    version = 4
    captions: Stage
    embeddings: tuple[Stage, ...] = field(metadata=LOOKED_UP)  # of the captions' images
    galleries: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of those images, where the tower runs online
    center: Stage
    vdg: VdgConfig
    align: AlignConfig
    seed: int
    resources: WorkerResources

    def check(self) -> dict[str, str]:
        """A batch has to divide over the workers."""
        return super().check() | unfit("align.training", self.align.training, self.resources)

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError before anything is loaded when there is no caption, or an image has no embeddings."""
        captions, features = run.output(self.captions), features_of(run, self.embeddings, self.galleries, self.center)
        require_rows(captions, "captions")
        images = captions.read_parts(tables.CAPTIONS, ["image_id"])["image_id"].to_numpy()
        features.check(images, f"align.captions ({captions.uri})")
        description = describe("align", features, self.vdg)
        write_description(output, description, features)
        task = AlignTask(features, captions, description, self.align)
        train(output, task, self.align.training, self.seed, self.resources, run.monitor, run.groups)
        output.write_json(WARNINGS, unlearned(output))


def require_rows(table: Output, what: str) -> None:
    """Raises UserError where a table that is to be learned from is empty."""
    if not sum(table.part_rows().values()):
        raise UserError(f"{what}: {table.uri} has no rows; give a file with at least one")


@dataclass
class AlignTask:
    """What the training loop draws: captions of single images."""

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
    def _inputs(self) -> "FeatureInputs":
        from vdg.backbones.features import FeatureInputs

        return FeatureInputs(self.description, self.features.mean, self.config.max_tokens)

    @property
    def size(self) -> int:
        """Number of captions."""
        return len(self._table)

    def build(self) -> "Backbone":
        """The generator without LoRA."""
        from vdg.backbones import build_for_training

        return build_for_training(self.description, self.config.training)

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> "Batch":
        """Captions of `rows`, each with a random view of its image and a random instruction."""
        chosen = self._table.take(rows)
        values = self._source.take(chosen["image_id"].to_numpy(), self._source.draw_views(len(rows), rng))
        return self._inputs.captions(values, rng.integers(len(INSTRUCTIONS), size=len(rows)), chosen["caption"].to_pylist())

    def validate(self, module: Any) -> dict[str, float]:
        """Nothing: alignment is judged by what instruction makes of it."""
        return {}
