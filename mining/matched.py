"""Pairs that look like the labelled ones: their similarities are distributed as those of the labelled pairs.

A departure from the paper, whose labelled pairs came from its own walk. Where they did not, walked pairs hurt: on the
photos they are mostly of one product (README, results).
"""

from collections.abc import Iterator

import numpy as np

from mining.config import MatchedConfig
from mining.neighbours import neighbours

COUNTED_ANCHORS = 4096  # anchors whose candidates estimate the gallery's histogram


def match(
    vectors: np.ndarray, labelled: np.ndarray, config: MatchedConfig, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks (reference rows, target rows, similarities) of about `config.pairs` pairs, each [m].

    `vectors` are centred unit vectors float32 [n, dim], `labelled` the similarities of the labelled pairs. A candidate
    of similarity bin b is drawn with probability pairs x labelled share of b / candidates in b: both sides of the ratio
    are histograms, so the drawn pairs' histogram is the labelled pairs'.
    """
    rng = np.random.default_rng(seed)
    edges = np.linspace(-1, 1, config.bins + 1)
    sample = np.sort(rng.choice(len(vectors), min(config.sample, len(vectors)), replace=False))
    wanted = np.histogram(labelled, edges)[0] / len(labelled) * config.pairs
    probability = (wanted / _candidate_counts(vectors, sample, config, edges, rng).clip(1)).clip(max=1)
    for rows, columns, scores in _candidates(vectors, np.arange(len(vectors)), sample, config.neighbours):
        drawn = rng.random(len(scores)) < probability[_bin(scores, edges)]
        yield rows[drawn], columns[drawn], scores[drawn]


def _bin(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return (np.searchsorted(edges, scores, side="right") - 1).clip(0, len(edges) - 2)


def _candidate_counts(
    vectors: np.ndarray, sample: np.ndarray, config: MatchedConfig, edges: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Candidates in each bin over the whole gallery, scaled up from a seeded sample of the anchors."""
    anchors = np.sort(rng.choice(len(vectors), min(COUNTED_ANCHORS, len(vectors)), replace=False))
    counts = np.zeros(len(edges) - 1)
    for _, _, scores in _candidates(vectors, anchors, sample, config.neighbours):
        counts += np.bincount(_bin(scores, edges), minlength=len(counts))
    return counts * (len(vectors) / len(anchors))


def _candidates(
    vectors: np.ndarray, anchors: np.ndarray, sample: np.ndarray, top: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Flat blocks (anchor rows, candidate rows, cosines): each anchor with the sample, and with neighbours not in it."""
    in_sample = np.zeros(len(vectors), bool)
    in_sample[sample] = True
    for rows, near, near_scores in neighbours(vectors, top, anchors):
        scores = np.hstack([vectors[rows] @ vectors[sample].T, near_scores])
        columns = np.hstack([np.broadcast_to(sample, (len(rows), len(sample))), near])
        valid = columns != rows[:, None]
        valid[:, len(sample) :] &= (near >= 0) & ~in_sample[near]
        yield np.broadcast_to(rows[:, None], columns.shape)[valid], columns[valid], scores[valid]
