"""Pairs drawn uniformly: the paper's row without grouping (Table 4)."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from cluster.errors import UserError
from mining.features import ORIGIN
from mining.pairs.job import Mining, pairs_table, write_parts
from mining.pairs.similarities import cosines


def write_random(job: Mining) -> Iterator[int]:
    """Yields the number of images, once."""
    ids, vectors = job.vectors(ORIGIN)
    references, targets = random_pairs(len(ids), job.config.random.pairs, job.seed)

    def part(here: slice) -> pa.Table:
        return pairs_table(ids, references[here], targets[here], cosines(vectors, references[here], targets[here]), {})

    write_parts(job, len(references), part)
    yield len(ids)


def random_pairs(images: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(references [m], targets [m]), rows of distinct images: ordered pairs drawn uniformly without replacement.

    Raises UserError when there are fewer.
    """
    if pairs > (every := images * (images - 1)):
        raise UserError(f"mine.random.pairs: asked for {pairs}, but {images} images have {every} ordered pairs")
    references, others = np.divmod(np.random.default_rng(seed).choice(every, pairs, replace=False), images - 1)
    return references, others + (others >= references)  # the `others` of an image are numbered without itself
