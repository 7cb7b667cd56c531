"""Stages of cir over outputs that a test has made: score to evaluate."""

from collections.abc import Mapping

from cir.benchmarks.benchmark import Benchmark
from cir.benchmarks.official import Annotations
from cir.config import EvaluateConfig, PseudoSelection, VariantConfig
from cir.evaluate import Evaluate, EvaluateGiven
from cir.score import Score, Scoring
from cir.select import Pseudo, Select, SelectOwn
from cir.train import Train
from cluster.artifacts import Output
from cluster.config import (
    ActorResources,
    WorkerResources,
)
from cluster.monitor import Monitor
from cluster.stage import Source
from mining.config import TextTower
from mining.features import Features
from tests.stages import center_of, given, maybe, running, seen


def train_cir(
    output: Output,
    features: Features,
    triplets: Output,
    pseudo: Pseudo | None,
    config: VariantConfig,
    seed: int,
    resources: WorkerResources,
    monitor: Monitor,
) -> None:
    Train(
        name=f"variant.s{seed}",
        triplets=given(triplets),
        **seen(features),
        center=center_of(features),
        pseudo_triplets=given(pseudo.triplets) if pseudo else None,
        scores=maybe(pseudo.round_trip) if pseudo else None,
        config=config,
        seed=seed,
        resources=resources,
    ).work(output, running(monitor))


def score_round_trip(job: Scoring, resources: ActorResources, monitor: Monitor) -> None:
    Score(
        name="g.judge",
        pseudo_triplets=given(job.pseudo),
        judge=given(job.model),
        embeddings=given(job.embeddings),
        gallery=given(job.gallery),
        config=job.config,
        seed=job.seed,
        resources=resources,
    ).work(job.output, running(monitor))


def select_confident(output: Output, pseudo: Pseudo, labelled: Output, selection: PseudoSelection, monitor: Monitor) -> None:
    Select(
        name="vdg.r2",
        triplets=given(labelled),
        pseudo_triplets=given(pseudo.triplets),
        scores=maybe(pseudo.round_trip),
        selection=selection,
    ).work(output, running())


def with_own_deltas(output: Output, labelled: Output, generated: Output, monitor: Monitor, alone: bool = False) -> None:
    SelectOwn(name="x.vdg", triplets=given(labelled), pseudo_triplets=given(generated), alone=alone).work(output, running())


def known(benchmark: Benchmark) -> Annotations:
    """Files that hold a benchmark that a test has made."""

    class Known(Annotations):
        def load(self, remove_reference: bool | None = None) -> Benchmark:
            return benchmark

    return Known("evaluate.annotations", "nowhere")


def evaluate(
    output: Output,
    benchmark: Benchmark,
    embeddings: Output,
    gallery: Output,
    models: Mapping[str, Output],
    text: TextTower | None,
    config: EvaluateConfig,
    resources: ActorResources,
    monitor: Monitor,
    deltas: Output | None = None,
) -> None:
    Evaluate(
        name="all",
        queries=given(gallery),
        gallery=given(gallery),
        embeddings=given(embeddings),
        models={name: given(model) for name, model in models.items()},
        text=text,
        deltas=maybe(deltas),
        annotations=known(benchmark),
        config=config,
        resources=resources,
    ).work(output, running(monitor))


def evaluate_given(
    output: Output, benchmark: Benchmark, file: str, config: EvaluateConfig, resources: ActorResources, monitor: Monitor
) -> None:
    EvaluateGiven(
        name="all",
        queries=given(output),
        annotations=known(benchmark),
        embeddings=Source("evaluate.embeddings", file),
        config=config,
        resources=resources,
    ).work(output, running(monitor))
