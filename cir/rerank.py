"""The stage rerank: the generator orders the best images of the models' rankings again. Beyond the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cir import figures
from cir.benchmarks.benchmark import Query
from cir.candidates import candidate_id
from cir.config import RerankConfig
from cir.evaluate import GAIN, METRICS, RANKINGS, Evaluate, figures_of, ranking
from cir.metrics import ALIKE, NO_IMAGE
from cluster.artifacts import Output
from cluster.stage import RunContext, Stage
from mining import tables

RERANKED = "+rerank"  # ends the variant's name of a ranking that was ordered again


@dataclass(frozen=True, eq=False, kw_only=True)
class Rerank(Stage):
    """`rerank:all`: the best images of each query, by the cosine + weight * log p(text | reference, image).

    The pointwise mutual information, log p less its mean over the query's n - 1 other candidates, is n / (n - 1) times log p
    and what is one number for the query: the same order by another weight. A target's rank in its query's group, and whether
    the reference is first, stay the model's own.

    Written are the rankings, and `metrics.json` and `gain.json` of the models' own rows with these beside them.
    """

    evaluation: Evaluate
    models: Mapping[str, str]  # the evaluation's, by the name that each gets re-ranked
    likelihoods: Mapping[str, Stage]  # of the evaluation's candidates, by the same names
    config: RerankConfig

    def config_field(self, name: str) -> str:
        """A part of the evaluate section."""
        return "evaluate.rerank" if name == "config" else super().config_field(name)

    def work(self, output: Output, run: RunContext) -> None:
        """All in the memory of the driver: rankings are cut to their best images."""
        evaluation, benchmark = run.output(self.evaluation), self.evaluation.benchmark(run)
        run.monitor.start(len(self.likelihoods) * len(benchmark.queries), "ranking")
        for name, stage in self.likelihoods.items():
            scores = run.output(stage).read_parts(tables.SCORES).to_pydict()
            likelihoods = dict(zip(scores["triplet_id"], scores["value"], strict=True))
            for protocol in benchmark.protocols:
                plain = evaluation.read_table(ranking(protocol, self.models[name]), RANKINGS)
                again = reranked(plain, benchmark.queries, likelihoods, self.config)
                output.write_table(ranking(protocol, name), again, RANKINGS)
            run.monitor.advance(len(benchmark.queries))
        found = {name: figures.flat(figures_of(benchmark, evaluation, name)) for name in self.evaluation.models}
        found |= {name: figures.flat(figures_of(benchmark, output, name)) for name in self.likelihoods}
        output.write_json(METRICS, figures.by_variant(found))
        output.write_json(GAIN, figures.gains(found, self.evaluation.config, benchmark.classes_of_queries))


def reranked(plain: pa.Table, queries: Sequence[Query], likelihoods: Mapping[int, float], config: RerankConfig) -> pa.Table:
    """A ranking (evaluate.RANKINGS) with its best `config.top` images ordered again; `likelihoods` by `candidate_id`."""
    columns = {name: np.stack(plain[name].to_numpy()) for name in ("image_ids", "scores", "correct")}
    best = columns["image_ids"][:, : config.top]
    told = [
        [0.0 if image == NO_IMAGE else likelihoods[candidate_id(query.query_id, image)] for image in images]
        for query, images in zip(queries, best.tolist(), strict=True)
    ]
    values = columns["scores"][:, : config.top] + config.weight * np.array(told)  # past the gallery's end it stays -inf
    order = np.argsort(-values, axis=1, kind="stable")
    for column in columns.values():
        column[:, : config.top] = np.take_along_axis(column[:, : config.top], order, axis=1)
    changed = {name: list(column) for name, column in columns.items()}
    changed["target_rank"] = _target_ranks(plain, values, queries)
    return pa.table({name: changed.get(name, plain[name]) for name in RANKINGS.names}, schema=RANKINGS)


def _target_ranks(plain: pa.Table, values: np.ndarray, queries: Sequence[Query]) -> list[float | None]:
    """As in `metrics.rank_all`, by `values` [queries, top] of the first images; a target that is not among them stays."""
    ranks = plain["target_rank"].to_pylist()
    for place, (query, images) in enumerate(zip(queries, plain["image_ids"].to_pylist(), strict=True)):
        best = images[: values.shape[1]]
        if query.targets and query.targets[0] in best:
            own = best.index(query.targets[0])
            above = np.delete(values[place] - values[place, own], own)
            ranks[place] = float(1 + (above > ALIKE).sum() + (np.abs(above) <= ALIKE).sum() / 2)
    return ranks
