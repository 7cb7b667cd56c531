"""The stage mine: related pairs of a gallery's images, by the paper's walk, matched to the labelled pairs, or at random.

One Ray task searches the gallery: an image's neighbours may be anywhere in it. The vectors lie in a memory-mapped file.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from cluster.artifacts import Output
from cluster.config import TaskResources
from cluster.errors import UserError
from cluster.stage import Run, Stage
from mining import tables
from mining.config import MineConfig
from mining.embeddings import view_of
from mining.excluded import Excluded, Guard, find_excluded
from mining.gallery import part_name
from mining.neighbours import blocks_of
from mining.pairs.job import NEIGHBOURS, Mining, pairs_table
from mining.pairs.matched import write_matched
from mining.pairs.matched_groups import write_groups
from mining.pairs.random import write_random
from mining.pairs.similarities import write_similarities
from mining.pairs.walk import CANDIDATES, GROUP_SIZE, write_walked

METHODS = {"walk": write_walked, "matched": write_matched, "matched_groups": write_groups, "random": write_random}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Mine(Stage):
    """`mine:<gallery>`: the pairs table in parts of `config.part_rows`.

    Images of the benchmarks in `excluded` are rejects and in no pair; however many they are the stage does not fail: that is
    what it was asked for. Anchors are searched part by part, so a killed stage goes on from the parts that exist; matched
    groups are drawn in one go.
    """

    version = 4
    table = "pairs"
    embeddings: Stage
    config: MineConfig
    seed: int
    labelled: Stage | None = None  # triplets whose similarities matched pairs imitate
    center: Stage | None = None  # of those triplets' images
    gallery: Stage | None = None  # of the embeddings; needed where something is excluded
    excluded: Mapping[str, Stage] = field(default_factory=dict)  # benchmark -> names and hashes of its val and test images
    looks: Mapping[str, Stage] = field(default_factory=dict)  # benchmark -> embeddings of them, where the images are given
    resources: TaskResources

    @property
    def reject_limit(self) -> float:
        """Any number of images may be excluded."""
        return 1.0

    def work(self, output: Output, run: Run) -> None:
        """Raises UserError when the gallery has fewer images than a group, or no pair is found."""
        embeddings, labelled = run.output(self.embeddings), run.output(self.labelled) if self.labelled else None
        excluded = self._excluded(output, run)
        images = sum(count for part, count in embeddings.part_rows().items() if view_of(part) == 0) - len(excluded)
        if images < GROUP_SIZE:
            less = f" that no benchmark excludes ({len(excluded)} are excluded)" if len(excluded) else ""
            raise UserError(
                f"mine.gallery: '{self.config.gallery}' has {images} image(s){less}, fewer than a group of {GROUP_SIZE}"
            )
        shards = self._missing_shards(output, images)
        left = images if shards is None else sum(map(len, shards.values()))
        run.monitor.start(images, "image", images - left)
        center = run.output(self.center) if self.center else None
        job = Mining(output, embeddings, labelled, center, self.config, self.seed, excluded, shards or {})
        task: Any = ray.remote(**self.resources.ray_options())(_mine)
        for searched in task.remote(job, self.resources.cpus):
            run.monitor.advance(ray.get(searched))
        if output.exists(NEIGHBOURS):
            _LOG.info("mine: neighbours by %s", output.read_json(NEIGHBOURS))

    def _excluded(self, output: Output, run: Run) -> np.ndarray:
        """Ids of the images that are not mined."""
        if not self.excluded:
            return np.empty(0, np.int64)
        assert self.gallery is not None
        benchmarks = [
            Excluded(name, run.output(images), run.output(self.looks[name]) if name in self.looks else None)
            for name, images in self.excluded.items()
        ]
        guard = Guard(run.output(self.gallery), tuple(benchmarks), self.config.duplicate_similarity)
        task: Any = ray.remote(**self.resources.ray_options())(_exclude)
        return ray.get(task.remote(output, run.output(self.embeddings), guard, self.resources.cpus))

    def _missing_shards(self, output: Output, images: int) -> dict[str, np.ndarray] | None:
        """Rows of the anchors of each part that does not exist: of the walk's candidates, or of the table of matched pairs.

        Matched anchors come in a seeded order, so that every part is a fair sample of the gallery. None for the other methods.
        """
        if self.config.method == "walk":
            shards, finished = blocks_of(np.arange(images)), set(output.names(CANDIDATES))
        elif self.config.method == "matched":
            count = min(-(-self.config.matched.pairs // self.config.part_rows), images)
            shards, finished = np.array_split(np.random.default_rng(self.seed).permutation(images), count), set(output.parts())
        else:
            return None
        return {part_name(i): shard for i, shard in enumerate(shards) if part_name(i) not in finished}


@dataclass(frozen=True, eq=False, kw_only=True)
class MineLabelled(Stage, kind="mine"):
    """`mine:<triplets>`: the pairs of labelled triplets, each once, for a generator to write its own deltas of."""

    table = "pairs"
    triplets: Stage

    def work(self, output: Output, run: Run) -> None:
        """One part, without similarities."""
        labelled = run.output(self.triplets).read_parts(tables.TRIPLETS, ["reference_id", "target_id"])
        pairs = np.unique(np.stack([column.to_numpy() for column in labelled.columns], axis=1), axis=0)
        run.monitor.start(len(pairs), "pair")
        rows, ids = np.arange(len(pairs)), pairs.reshape(-1)
        found = pairs_table(ids, 2 * rows, 2 * rows + 1, np.full(len(pairs), np.nan, np.float32), {})
        output.write_table(part_name(0), found, tables.PAIRS)
        run.monitor.advance(len(pairs))


def _exclude(output: Output, embeddings: Output, guard: Guard, cpus: float) -> np.ndarray:
    """Ids of the images that are not mined; writes them as rejects."""
    _limit_threads(cpus)
    found = find_excluded(guard, embeddings)
    output.write_rejects("excluded.parquet", list(found.values()))
    return np.fromiter(found, np.int64)


def _mine(job: Mining, cpus: float) -> Iterator[int]:
    """Yields the number of anchors searched, block by block."""
    _limit_threads(cpus)
    yield from METHODS[job.config.method](job)
    if not sum(job.output.part_rows().values()):
        raise UserError(f"mine: no pairs found among the images of '{job.config.gallery}'; relax mine.{job.config.method}")
    write_similarities(job.output, job.embeddings, job.center, job.excluded, job.labelled, job.seed)


def _limit_threads(cpus: float) -> None:
    import faiss

    faiss.omp_set_num_threads(max(int(cpus), 1))
