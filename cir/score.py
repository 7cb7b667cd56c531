"""The stage score: how high a retrieval model ranks the target of each pseudo triplet for (reference, delta).

Beyond the paper, which filters nothing. A model trained on the labelled triplets alone that finds the target by the
generated delta says that the delta is right; one that uses the pseudo triplets itself would agree with their mistakes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cir.config import ScoreConfig
from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.parts import run_actors
from cluster.stage import RunContext, Stage
from mining import tables
from mining.embeddings import plain_parts, read_ids
from mining.features import Features


@dataclass(frozen=True, eq=False, kw_only=True)
class Score(Stage):
    """`score:<gallery>.<judge>`: a score for every pseudo triplet, -ln of its target's rank; 0 is best.

    The target is ranked among `config.gallery_images` images of the gallery, a sample that depends on the seed alone; the
    reference is removed.
    """

    version = 3
    pseudo_triplets: Stage
    judge: Stage
    embeddings: Stage  # of the gallery that the pairs were mined from
    gallery: Stage
    config: ScoreConfig
    seed: int
    resources: ActorResources

    def work(self, output: Output, run: RunContext) -> None:
        """Part by part of the pseudo triplets, on a pool of actors."""
        pseudo, judge = run.output(self.pseudo_triplets), run.output(self.judge)
        embeddings, gallery = run.output(self.embeddings), run.output(self.gallery)
        job = Scoring(output, pseudo, judge, embeddings, gallery, self.config, self.seed)
        run_actors(PartScorer, job, job.pseudo.part_rows(), self.resources, run.monitor, "triplet")


@dataclass(frozen=True)
class Scoring:
    """What an actor needs to turn a part of pseudo triplets into a part of scores."""

    output: Output
    pseudo: Output
    model: Output
    embeddings: Output  # of the gallery that the pairs were mined from
    gallery: Output
    config: ScoreConfig
    seed: int


class PartScorer:
    """An actor that holds the model and the sampled gallery, and scores parts of pseudo triplets."""

    def __init__(self, job: Scoring, cpus: float) -> None:
        from cir.compose import Composer, target_side
        from cluster.devices import limit_threads

        limit_threads(cpus)
        self.job, self.prepare = job, target_side(job.model)
        self.gallery_ids = _sample(job)
        self.features = Features(job.embeddings).open_plain(_images(job.pseudo, self.gallery_ids))
        self.gallery = self._vectors(self.gallery_ids)
        texts = {deltas[0] for deltas in job.pseudo.read_parts(tables.TRIPLETS, ["deltas"])["deltas"].to_pylist()}
        self.composer = Composer(job.model, job.embeddings, job.gallery, texts)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Score and write the part that `row` names."""
        name = str(row["part"][0])
        triplets = self.job.pseudo.read_table(name, tables.TRIPLETS)
        values = -np.log(self._ranks(triplets)).astype(np.float32)
        scorers = pa.array([tables.ROUND_TRIP] * len(triplets))
        table = pa.table([triplets["triplet_id"], scorers, pa.array(values)], schema=tables.SCORES)
        self.job.output.write_table(name, table, tables.SCORES)
        return {"part": [name], "rows": [len(triplets)]}

    def _ranks(self, triplets: pa.Table) -> np.ndarray:
        """Rank [n] of each target, 1 is best; ties share their mean."""
        from cir.metrics import rank

        references, targets = (triplets[name].to_numpy() for name in ("reference_id", "target_id"))
        texts = [deltas[0] for deltas in triplets["deltas"].to_pylist()]
        queries = self.composer.queries(references, texts, self.job.config.batch_size)
        blocks = [(self.gallery_ids, self.gallery)]
        return rank(queries, blocks, references, targets, self._vectors(targets), top=1).target_rank

    def _vectors(self, image_ids: np.ndarray) -> np.ndarray:
        return self.prepare(self.features.take(image_ids, np.zeros(len(image_ids), np.int64))[:, 0])


def _sample(job: Scoring) -> np.ndarray:
    """Sorted ids of the images that targets are ranked among."""
    ids = np.concatenate([read_ids(job.embeddings, part) for part in plain_parts(job.embeddings)])
    count = min(job.config.gallery_images, len(ids))
    return np.sort(np.random.default_rng(job.seed).choice(np.sort(ids), count, replace=False))


def _images(pseudo: Output, sample: np.ndarray) -> np.ndarray:
    """Ids of every image that any part needs: opened once, so that the actors of a node share one file of features."""
    table = pseudo.read_parts(tables.TRIPLETS, ["reference_id", "target_id"])
    return np.union1d(tables.images_of(table), sample)
