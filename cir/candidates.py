"""The stage candidates: the images that a re-ranking can move."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cir.benchmarks.benchmark import Query
from cir.evaluate import RANKINGS, Evaluate, ranking
from cir.metrics import NO_IMAGE
from cluster.artifacts import Output
from cluster.stage import RunContext, Stage
from mining import tables
from mining.gallery import part_name

PART_ROWS = 4096


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidates(Stage):
    """`candidates:all`: each query with the `top` images that any of the models ranks highest, as triplets, each once."""

    table = "candidates"
    evaluation: Evaluate
    models: tuple[str, ...]  # by their names in the evaluation
    top: int

    def work(self, output: Output, run: RunContext) -> None:
        """In the order of the queries, so that rows with one reference and text stand together."""
        ranked, benchmark = run.output(self.evaluation), self.evaluation.benchmark(run)
        files = [ranking(protocol, name) for name in self.models for protocol in benchmark.protocols]
        found = [np.stack(ranked.read_table(file, RANKINGS, ["image_ids"])["image_ids"].to_numpy()) for file in files]
        best = np.concatenate([image_ids[:, : self.top] for image_ids in found], axis=1)
        rows = [row for query, images in zip(benchmark.queries, best, strict=True) for row in _rows(query, images)]
        tables.check_unique((row["triplet_id"] for row in rows), "candidates")
        run.monitor.start(len(rows), "candidate")
        for part, first in enumerate(range(0, len(rows), PART_ROWS)):
            chosen = rows[first : first + PART_ROWS]
            output.write_table(part_name(part), pa.Table.from_pylist(chosen, tables.TRIPLETS), tables.TRIPLETS)
            run.monitor.advance(len(chosen))


def candidate_id(query_id: int, image_id: int) -> int:
    """Id of a query's candidate."""
    return tables.stable_id("candidate", query_id, image_id)


def _rows(query: Query, images: np.ndarray) -> list[dict[str, Any]]:
    query_of = {"reference_id": query.reference, "deltas": [query.text], "source": "candidate"}
    return [
        {"triplet_id": candidate_id(query.query_id, image), "target_id": image, **query_of}
        for image in np.unique(images[images != NO_IMAGE]).tolist()
    ]
