"""The stage likelihood: what a generator thinks of texts that others wrote, one part of triplets to one part of scores."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.parts import run_actors
from cluster.stage import LOOKED_UP, RunContext, Stage
from mining import tables
from vdg.description import read_description
from vdg.images import ImageSource, images_of
from vdg.instruct import Instruct


@dataclass(frozen=True, eq=False, kw_only=True)
class Likelihood(Stage):
    """`likelihood:vdg`: of every triplet log p(text | reference, target), in nats and of the whole text."""

    triplets: Stage
    vdg: Instruct
    embeddings: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of the triplets' images, where a tower sees them
    galleries: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of those images, where pixels are seen
    batch_size: int
    precision: str
    resources: ActorResources

    def work(self, output: Output, run: RunContext) -> None:
        """Part by part, on a pool of actors. Raises UserError before one starts when an image is missing."""
        triplets, model = run.output(self.triplets), run.output(self.vdg)
        images = images_of(run, self.embeddings, self.galleries, None)
        read_description(model)
        images.check(tables.images_in(triplets, tables.TRIPLETS), f"likelihood: {triplets.uri}")
        job = Reading(output, images, triplets, model, self.batch_size, self.precision)
        run_actors(PartReader, job, triplets.part_rows(), self.resources, run.monitor, "triplet")


@dataclass(frozen=True)
class Reading:
    """What an actor needs to turn a part of triplets into a part of likelihoods."""

    output: Output
    images: ImageSource
    triplets: Output
    model: Output
    batch_size: int
    precision: str


class PartReader:
    """An actor that holds the generator."""

    def __init__(self, job: Reading, cpus: float) -> None:
        from cluster.devices import limit_threads
        from cluster.provenance import record_environment
        from vdg.backbones import load_generator

        limit_threads(cpus)
        self.job = job
        self.images = job.images.open_plain(tables.images_in(job.triplets, tables.TRIPLETS))  # of all: a node's actors share it
        texts = {deltas[0] for deltas in job.triplets.read_parts(tables.TRIPLETS, ["deltas"])["deltas"].to_pylist()}
        self.generator, self.inputs = load_generator(job.model, job.precision, sorted(texts))
        record_environment(job.output, job.precision)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Read and write the part that `row` names."""
        name = str(row["part"][0])
        triplets = self.job.triplets.read_table(name, tables.TRIPLETS)
        size = self.job.batch_size
        values = [value for first in range(0, len(triplets), size) for value in self._read(triplets.slice(first, size))]
        scorers = pa.array([tables.LIKELIHOOD] * len(triplets))
        table = pa.table([triplets["triplet_id"], scorers, pa.array(values, pa.float32())], schema=tables.SCORES)
        self.job.output.write_table(name, table, tables.SCORES)
        return {"part": [name], "rows": [len(triplets)]}

    def _read(self, triplets: pa.Table) -> list[float]:
        plain, texts = np.zeros(len(triplets), np.int64), [deltas[0] for deltas in triplets["deltas"].to_pylist()]
        references, targets = (self.images.take(triplets[name].to_numpy(), plain) for name in ("reference_id", "target_id"))
        return self.generator.log_likelihood(self.inputs.pairs(references, targets, texts))
