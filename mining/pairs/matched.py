"""Pairs that look like the labelled ones: their similarities are distributed as those of the labelled pairs.

A departure from the paper, whose labelled pairs came from its own walk. Where they did not, walked pairs hurt: on the
photos they are mostly of one product (docs/method.md).
"""

from collections.abc import Iterator

import numpy as np

from cluster.errors import UserError
from mining import tables
from mining.config import MatchedConfig
from mining.neighbours import Nearest
from mining.pairs.job import Mining, pairs_table
from mining.pairs.similarities import cosines, labelled_rows

COUNTED_ANCHORS = 4096  # anchors whose candidates estimate the gallery's histogram
BLOCK = 256  # anchors that share a sample
Block = tuple[np.ndarray, np.ndarray, np.ndarray]


class Matcher:
    """Draws about `config.pairs` pairs over all anchors of a gallery, shard of anchors by shard.

    `vectors` are centred unit vectors float32 [n, dim], `nearest` their neighbours, `labelled` the similarities of the
    labelled pairs. Each anchor has as candidates its nearest neighbours and a seeded sample of the gallery, a fresh one
    for each block of anchors: one for all would hold nearly all targets. A candidate of similarity bin b is drawn with
    probability pairs x labelled share of b / candidates in b: both sides of the ratio are histograms, so the drawn pairs'
    histogram is the labelled pairs'.
    """

    def __init__(self, vectors: np.ndarray, nearest: Nearest, labelled: np.ndarray, config: MatchedConfig, seed: int) -> None:
        self.vectors, self.nearest = vectors, nearest
        self._sampled = min(config.sample, len(vectors))
        self._edges = np.linspace(-1, 1, config.bins + 1)
        self._wanted = np.histogram(labelled, self._edges)[0] / len(labelled) * config.pairs
        self._probability = self._ratio(self._candidate_counts(np.random.default_rng(seed)))

    def draw(self, anchors: np.ndarray, rng: np.random.Generator) -> Block:
        """(reference rows, target rows, similarities), each [m], of pairs whose references are `anchors`."""
        drawn = []
        for rows, columns, scores in self.candidates(anchors, rng):
            valid = np.isfinite(scores)
            block = np.broadcast_to(rows[:, None], columns.shape)[valid], columns[valid], scores[valid]
            chosen = rng.random(len(block[2])) < self.probability(block[2])
            drawn.append([column[chosen] for column in block])
        references, targets, scores = (np.concatenate(columns) for columns in zip(*drawn, strict=True))
        return references, targets, scores

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """With which candidates of these similarities are drawn; 0 where there is none (similarity -inf)."""
        return np.where(np.isfinite(scores), self._probability[self._bin(scores)], 0)

    def share_to_keep(self, similarities: np.ndarray) -> np.ndarray:
        """Of each of these pairs, so that those kept are about `config.pairs` and distributed as the labelled ones."""
        bins = self._bin(similarities)
        return self._ratio(np.bincount(bins, minlength=len(self._wanted)))[bins]

    def candidates(self, anchors: np.ndarray, rng: np.random.Generator) -> Iterator[Block]:
        """Blocks (anchor rows [b], candidate rows [b, c], cosines [b, c]) of a sample, and neighbours that are not in it.

        The cosine is -inf where a place has no candidate.
        """
        for first in range(0, len(anchors), BLOCK):
            rows = anchors[first : first + BLOCK]
            near, near_scores = self.nearest.rows[rows], np.array(self.nearest.cosines[rows])
            sample = np.sort(rng.choice(len(self.vectors), self._sampled, replace=False))
            near_scores[(near < 0) | np.isin(near, sample)] = -np.inf
            columns = np.hstack([np.broadcast_to(sample, (len(rows), len(sample))), near])
            scores = np.hstack([self.vectors[rows] @ self.vectors[sample].T, near_scores])
            scores[columns == rows[:, None]] = -np.inf
            yield rows, columns, scores

    def _ratio(self, counts: np.ndarray) -> np.ndarray:
        return (self._wanted / counts.clip(1)).clip(max=1)

    def _bin(self, scores: np.ndarray) -> np.ndarray:
        return (np.searchsorted(self._edges, scores, side="right") - 1).clip(0, len(self._edges) - 2)

    def _candidate_counts(self, rng: np.random.Generator) -> np.ndarray:
        """Candidates in each bin over the whole gallery, scaled up from a seeded sample of the anchors."""
        images = len(self.vectors)
        anchors = np.sort(rng.choice(images, min(COUNTED_ANCHORS, images), replace=False))
        counts = np.zeros(len(self._edges) - 1)
        for _, _, scores in self.candidates(anchors, rng):
            counts += np.bincount(self._bin(scores[np.isfinite(scores)]), minlength=len(counts))
        return counts * (images / len(anchors))


def write_matched(job: Mining) -> Iterator[int]:
    """Pairs of each shard of anchors, by its own seed. Yields the number of anchors searched, shard by shard."""
    if not job.shards:
        return
    ids, cosine = job.vectors(job.mean)
    matcher = matcher_of(job, ids, cosine)
    for name, anchors in job.shards.items():
        drawn = matcher.draw(anchors, np.random.default_rng([job.seed, tables.stable_id(name)]))
        job.output.write_table(name, pairs_table(ids, *drawn, {}), tables.PAIRS)
        yield len(anchors)


def matcher_of(job: Mining, ids: np.ndarray, cosine: np.ndarray) -> Matcher:
    """Of the images that may be mined. Raises UserError when no labelled pair is among them."""
    labels = cosines(cosine, *labelled_rows(ids, job.labelled))
    if not len(labels):
        config = job.config
        raise UserError(f"mine.triplets: no labelled pair of '{config.triplets}' has both images in gallery '{config.gallery}'")
    return Matcher(cosine, job.nearest(), labels, job.config.matched, job.seed)
