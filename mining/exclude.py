"""The stage exclude: the images of a gallery that no benchmark's val or test images keep from being mined."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.parts import run_actors
from cluster.stage import Run, Stage
from mining import tables
from mining.embeddings import plain_parts, read_ids
from mining.excluded import Excluded, Guards


@dataclass(frozen=True, eq=False, kw_only=True)
class Exclude(Stage):
    """`exclude:<gallery>`: the ids of the images that may be mined, in the parts of the embeddings; the others are rejects."""

    table = "images"
    gallery: Stage
    embeddings: Stage
    benchmarks: Mapping[str, Stage]  # benchmark -> names and hashes of its val and test images
    looks: Mapping[str, Stage] = field(default_factory=dict)  # benchmark -> embeddings of them, where the images are given
    duplicate_similarity: float
    resources: ActorResources

    @property
    def reject_limit(self) -> float:
        """Any number of images may be excluded: that is what it was asked for."""
        return 1.0

    def work(self, output: Output, run: Run) -> None:
        """Part by part of the embeddings."""
        looks = {name: run.output(stage) for name, stage in self.looks.items()}
        benchmarks = tuple(Excluded(name, run.output(images), looks.get(name)) for name, images in self.benchmarks.items())
        embeddings = run.output(self.embeddings)
        job = _Job(output, run.output(self.gallery), embeddings, benchmarks, self.duplicate_similarity)
        sizes = embeddings.part_rows()
        run_actors(
            _Excluder, job, {part: sizes[part] for part in plain_parts(embeddings)}, self.resources, run.monitor, "image"
        )


@dataclass(frozen=True)
class _Job:
    output: Output
    gallery: Output
    embeddings: Output
    benchmarks: tuple[Excluded, ...]
    similarity: float


class _Excluder:
    """An actor that holds what the benchmarks forbid."""

    def __init__(self, job: _Job, cpus: float) -> None:
        from mining.search import limit_threads

        limit_threads(cpus)
        self.job, self.guards = job, Guards(job.gallery, job.benchmarks, job.similarity)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write one part."""
        part, job = str(row["part"][0]), self.job
        ids, found = read_ids(job.embeddings, part), self.guards.find(job.embeddings, part)
        free = ids[np.isin(ids, list(found), invert=True)]
        job.output.write_rejects(part, list(found.values()))
        job.output.write_table(part, pa.table([free], schema=tables.MINEABLE), tables.MINEABLE)
        return {"part": [part], "rows": [len(ids)]}
