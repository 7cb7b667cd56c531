"""Stages of mining over outputs that a test has made: ingest to mine."""

from dataclasses import dataclass

from cluster.artifacts import Output
from cluster.config import (
    ActorResources,
    DecodeResources,
    EmbedResources,
    TaskResources,
)
from cluster.monitor import Monitor
from cluster.stage import Limit, Source
from mining.config import CaptionsConfig, GalleryConfig, IngestConfig, MineConfig, TowerConfig, ViewsConfig
from mining.embed import Embed
from mining.exclude import Exclude, Excluded
from mining.ingest import IngestCaptions, IngestGallery, IngestTriplets
from mining.mine import Mine
from mining.neighbours import Neighbours
from tests.stages import given, maybe, running


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
        splits=tuple(Source(f"ingest.galleries.{name}.split", split) for split in config.split or []),
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
