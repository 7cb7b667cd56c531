"""What every way to pair is given, and how it writes its pairs: in parts, each from its own pairs alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import Output
from mining import tables
from mining.config import MineConfig
from mining.features import read_mean, unit_vectors
from mining.gallery import part_name
from mining.neighbours import Nearest, read_neighbours


@dataclass(frozen=True)
class Mining:
    """What the task that mines is given."""

    output: Output
    embeddings: Output
    mineable: Output | None  # where some images are excluded
    neighbours: Output | None  # where the method looks at them
    labelled: Output | None
    center: Output | None  # of the labelled images
    config: MineConfig
    seed: int
    shards: dict[str, np.ndarray]  # rows of the anchors of each part that is still to be matched

    @property
    def mean(self) -> np.ndarray:
        """What matched pairs are centred by, float32 [dim]."""
        assert self.center is not None, "matched pairs have labelled ones to imitate"
        return read_mean(self.center)

    def vectors(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], unit vectors float32 [n, dim]) of the images that may be mined."""
        return unit_vectors(self.embeddings, mean, self.mineable)

    def nearest(self) -> Nearest:
        """The neighbours of those images."""
        assert self.neighbours is not None
        return read_neighbours(self.neighbours)


def pairs_table(
    ids: np.ndarray, references: np.ndarray, targets: np.ndarray, similarity: np.ndarray, columns: dict[str, Any]
) -> pa.Table:
    """Pairs table of rows of the gallery; what `columns` does not give of groups and ranks is null."""
    reference_ids, target_ids = ids[references], ids[targets]
    pair_ids = [tables.stable_id("pair", r, t) for r, t in zip(reference_ids.tolist(), target_ids.tolist(), strict=True)]
    known = {"pair_id": pair_ids, "reference_id": reference_ids, "target_id": target_ids, "similarity": similarity, **columns}
    nulls = [None] * len(references)
    return pa.table([pa.array(known.get(f.name, nulls), f.type) for f in tables.PAIRS], schema=tables.PAIRS)


def write_parts(job: Mining, pairs: int, part: Callable[[slice], pa.Table]) -> None:
    """Write the parts that are missing, each from its own pairs alone."""
    finished, rows = set(job.output.parts()), job.config.part_rows
    for index, start in enumerate(range(0, pairs, rows)):
        if part_name(index) not in finished:
            job.output.write_table(part_name(index), part(slice(start, start + rows)), tables.PAIRS)
