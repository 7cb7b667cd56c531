"""Rankings that a generator orders again."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cir.benchmarks.benchmark import Benchmark, Figures, Protocol, Query, recalls
from cir.candidates import Candidates, candidate_id
from cir.config import EvaluateConfig, RerankConfig
from cir.evaluate import RANKINGS, Evaluate
from cir.metrics import NO_IMAGE
from cir.rerank import Rerank, reranked
from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.stage import RunContext
from mining import tables
from tests.cir.stages import known
from tests.stages import given, running

NAMES = ("supervised.s0", "semi.s0", "semi.g1.s0")
QUERIES = (Query("a", 1, 10, "in red", (12,)), Query("b", 2, 10, "in blue", (14,)))
IMAGES = np.array([[11, 12, 13, 14], [11, 12, 13, NO_IMAGE]])


class One(Benchmark):
    """R@1 of the target alone."""

    def figures(self, protocol: Protocol, ranking: pa.Table) -> dict[str, Figures]:
        return {"": recalls(np.stack(ranking["correct"].to_numpy()), (1,))}

    def descriptions(self) -> dict[str, str]:
        return {"": "one"}


BENCHMARK = One(QUERIES, (Protocol("triplets", "", None, remove_reference=True),), {})


def plain() -> pa.Table:
    """Cosines fall by 0.1 a place; the second query's target was not found."""
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, -np.inf]], np.float32)
    columns = {
        "triplet_id": [1, 2],
        "image_ids": list(IMAGES),
        "scores": list(scores),
        "correct": list(BENCHMARK.correct(IMAGES)),
        "target_rank": np.array([2, 9], np.float32),
        "subset_rank": pa.nulls(2, pa.float32()),
        "reference_first": [False, True],
    }
    return pa.table(columns, schema=RANKINGS)


def likelihoods(**values: float) -> dict[int, float]:
    """0 but for those of the first query's image "i<id>"."""
    known = {candidate_id(query.query_id, image): 0.0 for query in QUERIES for image in (11, 12, 13, 14)}
    return known | {candidate_id(1, int(name[1:])): value for name, value in values.items()}


def test_the_best_images_are_ordered_by_cosine_and_likelihood() -> None:
    found = reranked(plain(), QUERIES, likelihoods(i11=-30, i13=-1), RerankConfig(top=3, weight=0.01)).to_pylist()
    assert found[0]["image_ids"] == [12, 13, 11, 14]  # 0.8, 0.69, 0.6; the last is not among the best three
    assert found[0]["correct"] == [True, False, False, False]
    assert found[0]["scores"] == pytest.approx([0.8, 0.7, 0.9, 0.6])
    assert found[0]["target_rank"] == 1
    assert found[1] == plain().to_pylist()[1]


def test_a_target_below_the_best_keeps_its_rank() -> None:
    found = reranked(plain(), QUERIES, likelihoods(i12=100), RerankConfig(top=2, weight=1)).to_pylist()
    assert [row["target_rank"] for row in found] == [1, 9]


def test_images_that_are_alike_share_their_rank() -> None:
    found = reranked(plain(), QUERIES, likelihoods(i12=10), RerankConfig(top=2, weight=0.01)).to_pylist()
    assert found[0]["target_rank"] == 1.5


def test_a_query_of_few_images_is_ordered_among_them() -> None:
    found = reranked(plain(), QUERIES, likelihoods() | {candidate_id(2, 13): 50.0}, RerankConfig(weight=0.01)).to_pylist()
    assert found[1]["image_ids"] == [13, 11, 12, NO_IMAGE]


def evaluation(output: Output) -> Any:
    """A finished evaluation of three models, that all rank alike."""

    class Finished(Evaluate, kind="evaluate"):
        def output(self, root: str) -> Output:
            return output

        def benchmark(self, run: RunContext) -> Benchmark:
            return BENCHMARK

    for name in NAMES:
        output.write_table(f"rankings/{name}.parquet", plain(), RANKINGS)
    made = given(output)
    return Finished(
        name="all",
        queries=made,
        gallery=made,
        embeddings=made,
        models=dict.fromkeys(NAMES, made),
        text=None,
        annotations=known(BENCHMARK),
        config=EvaluateConfig(recalls=[1], resamples=20),
        resources=ActorResources(),
    )


def test_candidates_are_the_best_images_of_any_model_each_once(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "candidates"))
    Candidates(name="all", evaluation=evaluation(Output(str(tmp_path / "e"))), models=NAMES[:2], top=2).work(output, running())
    rows = output.read_parts(tables.TRIPLETS).to_pylist()
    assert [(row["reference_id"], row["target_id"], row["deltas"]) for row in rows] == [
        (10, 11, ["in red"]),
        (10, 12, ["in red"]),
        (10, 11, ["in blue"]),
        (10, 12, ["in blue"]),
    ]
    assert rows[1]["triplet_id"] == candidate_id(1, 12)


def test_rows_stand_beside_the_plain_ones_by_every_generator(tmp_path: Path) -> None:
    output, likely = Output(str(tmp_path / "rerank")), Output(str(tmp_path / "likelihood"))
    ids, values = zip(*likelihoods(i11=-30.0).items(), strict=True)
    rows = {"triplet_id": ids, "scorer": [tables.LIKELIHOOD] * len(ids), "value": np.array(values, np.float32)}
    likely.write_table("part-00000.parquet", pa.table(rows, tables.SCORES), tables.SCORES)
    models = {
        "supervised+rerank.s0": "supervised.s0",
        "supervised+rerank.g1.s0": "supervised.s0",
        "semi+rerank.s0": "semi.s0",
        "semi+rerank.g1.s0": "semi.g1.s0",
    }
    Rerank(
        name="all",
        evaluation=evaluation(Output(str(tmp_path / "e"))),
        models=models,
        likelihoods=dict.fromkeys(models, given(likely)),
        config=RerankConfig(top=3, weight=0.01),
    ).work(output, running())
    metrics, gain = output.read_json("metrics.json"), output.read_json("gain.json")
    assert {name: row["R@1"]["seeds"] for name, row in metrics.items()} == {
        "supervised": [0],
        "semi": [0, 0],
        "supervised+rerank": [50, 50],
        "semi+rerank": [50, 50],
    }
    assert (gain["supervised+rerank"]["mean"], gain["supervised+rerank"]["generators"]) == (50, 2)
    assert output.names("rankings") == sorted(f"{name}.parquet" for name in models)
