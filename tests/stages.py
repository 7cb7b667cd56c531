"""Stages over outputs that a test has made: what a test has at hand, as the stage's parents."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from cir.benchmarks.benchmark import Benchmark
from cir.benchmarks.official import Annotations
from cir.config import EvaluateConfig, PseudoSelection, VariantConfig
from cir.evaluate import Evaluate, EvaluateGiven
from cir.score import Score, Scoring
from cir.select import Pseudo, Select, SelectOwn
from cir.train import Train
from cluster.app.graph import FLOW
from cluster.artifacts import Output
from cluster.config import (
    ActorResources,
    DecodeResources,
    EmbedResources,
    TaskResources,
    WorkerResources,
)
from cluster.monitor import Monitor, Silent
from cluster.stage import Limit, Run, Source, Stage
from mining.config import CaptionsConfig, GalleryConfig, IngestConfig, MineConfig, TextTower, TowerConfig, ViewsConfig
from mining.embed import Embed
from mining.embeddings import MEAN, plain_parts, read_part
from mining.exclude import Exclude
from mining.excluded import Excluded
from mining.features import Features, Online
from mining.ingest import IngestCaptions, IngestGallery, IngestTriplets
from mining.mine import Mine
from mining.neighbours import Neighbours
from vdg.align import Align
from vdg.config import AlignConfig, GenerateConfig, InstructConfig, VdgConfig
from vdg.generate import Generate
from vdg.images import Images, ImageSource
from vdg.instruct import Instruct


@dataclass(frozen=True, eq=False, kw_only=True)
class Given(Stage):
    """A finished stage whose output a test has made."""

    made: str  # its URI
    tower: TowerConfig | None = None
    views: ViewsConfig | None = None

    def output(self, root: str) -> Output:
        return Output(self.made)

    def work(self, output: Output, run: Run) -> None:
        raise AssertionError("it is made")


def given(output: Output, **fields: Any) -> Given:
    return Given(name=output.uri.rpartition("/")[2], made=output.uri, **fields)


def maybe(output: Output | None) -> Given | None:
    return None if output is None else given(output)


def running(monitor: Monitor | None = None) -> Run:
    return Run("no root", monitor or Silent())


def seen(images: ImageSource) -> dict[str, tuple[Stage, ...]]:
    """The fields of a stage that sees these images."""
    if isinstance(images, Images):
        return {"embeddings": (), "galleries": tuple(map(given, images.galleries))}
    assert isinstance(images, Features)
    online = images.online
    how = {"tower": online.tower, "views": online.views} if online else {}
    embeddings = tuple(given(output, **how) for output in (images.embeddings, *images.more))
    return {"embeddings": embeddings, "galleries": tuple(map(given, online.galleries)) if online else ()}


def centred_by_own(embeddings: Output, online: Online | None = None) -> Features:
    """Features that are centred by the mean of their own plain view, which lies beside them."""
    if not embeddings.exists(MEAN):
        values = np.concatenate([read_part(embeddings, part)[1] for part in plain_parts(embeddings)]).astype(np.float32)
        embeddings.write_bytes(MEAN, save({"mean": values.mean(axis=(0, 1))}))
    return Features(embeddings, online, center=embeddings)


def center_of(features: Features) -> Given:
    assert features.center is not None
    return given(features.center)


def ingest_gallery(
    output: Output,
    name: str,
    config: GalleryConfig,
    options: IngestConfig,
    resources: DecodeResources,
    monitor: Monitor,
) -> None:
    IngestGallery(
        name=name,
        images=Source(f"ingest.galleries.{name}.images", config.images, kept=not config.copy_images),
        splits=tuple(Source(f"ingest.galleries.{name}.split", split) for split in config.splits),
        shard_rows=options.shard_rows,
        shard_bytes=options.shard_bytes,
        max_pixels=options.max_pixels,
        max_reject_fraction=Limit(1),
        resources=resources,
    ).work(output, running(monitor))


def ingest_triplets(output: Output, gallery: Output, files: list[str], monitor: Monitor) -> None:
    sources = tuple(Source(f"ingest.triplets.x.file[{i}]", file) for i, file in enumerate(files))
    IngestTriplets(name="x", gallery=given(gallery), files=sources, max_reject_fraction=Limit(1)).work(output, running(monitor))


def ingest_captions(output: Output, gallery: Output, config: CaptionsConfig, monitor: Monitor) -> None:
    file = Source("ingest.captions.x.file", config.file)
    stage = IngestCaptions(name="x", gallery=given(gallery), file=file, until=config.until, max_reject_fraction=Limit(1))
    stage.work(output, running(monitor))


def embed_gallery(
    output: Output,
    gallery: Output,
    tower: TowerConfig,
    views: ViewsConfig,
    resources: EmbedResources | None = None,
    monitor: Monitor | None = None,
) -> None:
    resources = resources or EmbedResources(batch_size=16)
    stage = Embed(name="t.g", gallery=given(gallery), tower=tower, views=views, resources=resources)
    stage.work(output, running(monitor))


@dataclass(frozen=True)
class Guard:
    """The gallery that is mined, and what is kept out of its pairs."""

    gallery: Output
    benchmarks: tuple[Excluded, ...]
    similarity: float


def exclude(output: Output, embeddings: Output, guard: Guard) -> Output:
    Exclude(
        name="g",
        gallery=given(guard.gallery),
        embeddings=given(embeddings),
        benchmarks={one.benchmark: given(one.images) for one in guard.benchmarks},
        looks={one.benchmark: given(one.embeddings) for one in guard.benchmarks if one.embeddings},
        duplicate_similarity=guard.similarity,
        resources=ActorResources(),
    ).work(output, running())
    return output


def find_neighbours(
    output: Output,
    embeddings: Output,
    mineable: Output | None,
    config: MineConfig,
    resources: ActorResources | None = None,
    monitor: Monitor | None = None,
) -> Output:
    walks = config.method == "walk"
    Neighbours(
        name="t.g",
        embeddings=given(embeddings),
        mineable=maybe(mineable),
        top=config.walk.top if walks else config.matched.neighbours,
        center=None if walks else given(embeddings),  # a test keeps the mean there
        index=config.index,
        seed=0,
        resources=resources or ActorResources(),
    ).work(output, running(monitor))
    return output


def mine_pairs(
    output: Output,
    embeddings: Output,
    labelled: Output | None,
    guard: Guard | None,
    config: MineConfig,
    seed: int,
    resources: TaskResources,
    monitor: Monitor,
) -> None:
    """With what comes before: `.exclude` and `.neighbours` beside the output."""
    mineable = exclude(Output(f"{output.uri}.exclude"), embeddings, guard) if guard else None
    neighbours = Output(f"{output.uri}.neighbours")
    Mine(
        name="g",
        embeddings=given(embeddings),
        neighbours=None if config.method == "random" else given(find_neighbours(neighbours, embeddings, mineable, config)),
        mineable=maybe(mineable),
        labelled=maybe(labelled),
        center=given(embeddings) if labelled else None,  # a test keeps the mean there
        config=config,
        seed=seed,
        resources=resources,
    ).work(output, running(monitor))


def align(
    output: Output,
    features: Features,
    captions: Output,
    vdg: VdgConfig,
    config: AlignConfig,
    seed: int,
    resources: WorkerResources,
    monitor: Monitor,
) -> None:
    Align(
        name="vdg",
        captions=given(captions),
        **seen(features),
        center=center_of(features),
        vdg=vdg,
        align=config,
        seed=seed,
        resources=resources,
    ).work(output, running(monitor))


def instruct(
    output: Output,
    images: ImageSource,
    triplets: Output,
    aligned: Output | None,
    vdg: VdgConfig,
    config: InstructConfig,
    seed: int,
    resources: WorkerResources,
    monitor: Monitor,
) -> None:
    stage = Instruct(
        name="vdg",
        triplets=given(triplets),
        **seen(images),
        center=maybe(images.center) if isinstance(images, Features) else None,
        aligned=maybe(aligned),
        vdg=vdg,
        instruct=config,
        seed=seed,
        resources=resources,
    )
    stage.work(output, running(monitor))


def generate(
    output: Output,
    images: ImageSource,
    pairs: Output,
    model: Output,
    config: GenerateConfig,
    seed: int,
    resources: ActorResources,
    monitor: Monitor,
) -> None:
    made: Any = given(model)
    Generate(
        name="g",
        pairs=given(pairs),
        vdg=made,
        **seen(images),
        config=config,
        seed=seed,
        resources=resources,
    ).work(output, running(monitor))


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


def with_own_deltas(output: Output, labelled: Output, generated: Output, monitor: Monitor) -> None:
    SelectOwn(name="x.vdg", triplets=given(labelled), pseudo_triplets=given(generated)).work(output, running())


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
) -> None:
    Evaluate(
        name="all",
        queries=given(gallery),
        gallery=given(gallery),
        embeddings=given(embeddings),
        models={name: given(model) for name, model in models.items()},
        text=text,
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


def simple(
    instance: str,
    version: int = 1,
    settings: Mapping[str, Any] | None = None,
    work: Callable[[Output, Monitor], None] | None = None,
    parents: Mapping[str, Stage] | None = None,
    sources: Mapping[str, str] | None = None,
    max_reject_fraction: float = 0.0,
) -> Stage:
    """A stage that a test states whole, of any kind; what MLflow calls its output is as of the real ones of that kind."""
    kind, _, name = instance.partition(":")
    real = next((stage for stage in FLOW if stage.kind == kind), None)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Simple(Stage, kind=kind):
        table = real.table if real else None
        model = real.model if real else None

        @property
        def reject_limit(self) -> float:
            return max_reject_fraction

        def _flat(self) -> Iterator[tuple[str, Any, bool]]:
            yield from ((role, value, False) for role, value in (settings or {}).items())
            yield from ((role, parent, False) for role, parent in (parents or {}).items())
            yield from ((field, Source(field, path), False) for field, path in (sources or {}).items())

        def work(self, output: Output, run: Run) -> None:
            if work is not None:
                work(output, run.monitor)

    Simple.version = version
    return Simple(name=name)
