"""The stage mine: related pairs of a gallery's images, by the paper's walk, matched to the labelled pairs, or at random.

The neighbours were found by the stage before. One Ray task pairs: its tables and vectors lie in memory-mapped files.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.artifacts import Output
from cluster.config import TaskResources
from cluster.errors import UserError
from cluster.stage import RunContext, Stage
from mining import tables
from mining.config import MineConfig
from mining.embeddings import plain_parts
from mining.features import mineable_ids
from mining.gallery import part_name
from mining.pairs.job import Mining, pairs_table
from mining.pairs.matched import write_matched
from mining.pairs.matched_groups import write_groups
from mining.pairs.random import write_random
from mining.pairs.similarities import write_similarities
from mining.pairs.walk import GROUP_SIZE, write_walked

METHODS = {"walk": write_walked, "matched": write_matched, "matched_groups": write_groups, "random": write_random}


@dataclass(frozen=True, eq=False, kw_only=True)
class Mine(Stage):
    """`mine:<gallery>`: the pairs table in parts of `config.part_rows`.

    A killed stage goes on from the parts that exist; matched groups are drawn in one go.
    """

    version = 4
    table = "pairs"
    embeddings: Stage
    neighbours: Stage | None = None  # where the method looks at them
    mineable: Stage | None = None  # of the gallery's images, where some are excluded
    labelled: Stage | None = None  # triplets whose similarities matched pairs imitate
    config: MineConfig
    seed: int
    center: Stage | None = None  # of those triplets' images
    resources: TaskResources

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when the gallery has fewer images than a group, or no pair is found."""
        import ray

        parents = (self.embeddings, self.mineable, self.neighbours, self.labelled)
        embeddings, mineable, neighbours, labelled = (run.output(stage) if stage else None for stage in parents)
        assert embeddings is not None
        images = self._images(embeddings, mineable)
        shards = self._missing_shards(output, images) if self.config.method == "matched" else None
        left = images if shards is None else sum(map(len, shards.values()))
        run.monitor.start(images, "image", images - left)
        center = run.output(self.center) if self.center else None
        job = Mining(output, embeddings, mineable, neighbours, labelled, center, self.config, self.seed, shards or {})
        task: Any = ray.remote(**self.resources.ray_options())(_mine)
        for paired in task.remote(job):
            run.monitor.advance(*ray.get(paired))

    def _images(self, embeddings: Output, mineable: Output | None) -> int:
        parts = plain_parts(embeddings)
        every, free = (sum(output.part_rows()[part] for part in parts) for output in (embeddings, mineable or embeddings))
        if free < GROUP_SIZE:
            less = f" that no benchmark excludes ({every - free} are excluded)" if every > free else ""
            raise UserError(
                f"mine.gallery: '{self.config.gallery}' has {free} image(s){less}, fewer than a group of {GROUP_SIZE}"
            )
        return free

    def _missing_shards(self, output: Output, images: int) -> dict[str, np.ndarray]:
        """Rows of the anchors of each part of matched pairs that does not exist.

        They come in a seeded order, so that every part is a fair sample of the gallery.
        """
        count, finished = min(-(-self.config.matched.pairs // self.config.part_rows), images), set(output.parts())
        shards = np.array_split(np.random.default_rng(self.seed).permutation(images), count)
        return {part_name(i): shard for i, shard in enumerate(shards) if part_name(i) not in finished}


@dataclass(frozen=True, eq=False, kw_only=True)
class MineLabelled(Stage, kind="mine"):
    """`mine:<triplets>`: the pairs of labelled triplets, each once, for a generator to write its own deltas of."""

    table = "pairs"
    triplets: Stage

    def work(self, output: Output, run: RunContext) -> None:
        """One part, without similarities."""
        labelled = run.output(self.triplets).read_parts(tables.TRIPLETS, ["reference_id", "target_id"])
        pairs = np.unique(np.stack([column.to_numpy() for column in labelled.columns], axis=1), axis=0)
        run.monitor.start(len(pairs), "pair")
        rows, ids = np.arange(len(pairs)), pairs.reshape(-1)
        found = pairs_table(ids, 2 * rows, 2 * rows + 1, np.full(len(pairs), np.nan, np.float32), {})
        output.write_table(part_name(0), found, tables.PAIRS)
        run.monitor.advance(len(pairs))


def _mine(job: Mining) -> Iterator[tuple[int, float]]:
    """Yields the number of anchors paired, block by block, and the seconds since the last."""
    began = time.monotonic()
    for count in METHODS[job.config.method](job):
        yield count, time.monotonic() - began
        began = time.monotonic()
    if not sum(job.output.part_rows().values()):
        raise UserError(f"mine: no pairs found among the images of '{job.config.gallery}'; relax mine.{job.config.method}")
    ids = np.concatenate(list(mineable_ids(job.embeddings, job.mineable).values()))
    write_similarities(job.output, job.embeddings, job.center, ids, job.labelled, job.seed)
