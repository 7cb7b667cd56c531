"""What enters a run from outside, and what the image towers make of it: ingest, embed and center, where the graph begins."""

from typing import TypedDict, TypeVar

from cir.benchmarks.official import Annotations, IngestExcluded, IngestExcludedNames, IngestImages, IngestQueries
from cluster.app.config import RunConfig
from cluster.config import DecodeResources
from cluster.errors import UserError
from cluster.stage import Limit, Source, Stage
from mining.center import Center
from mining.config import CaptionsConfig, ExcludeConfig, TripletsConfig, ViewsConfig
from mining.embed import Embed
from mining.ingest import IngestCaptions, IngestGallery, IngestTriplets

Made = TypeVar("Made", bound=Stage)


class Seen(TypedDict):
    """What a stage sees of some galleries' images: their embeddings, their pixels, or both."""

    embeddings: tuple[Stage, ...]
    galleries: tuple[Stage, ...]


class Checks(TypedDict):
    """How a gallery's images are checked, and in which parts they are kept."""

    shard_rows: int
    shard_bytes: int
    max_pixels: int
    max_reject_fraction: Limit
    resources: DecodeResources


class Sources:
    """What enters a run from outside, and what the image towers make of it."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.ingest, self.evaluate = config, config.ingest, config.evaluate
        self.limit = Limit(config.ingest.max_reject_fraction)
        self._made: dict[str, Stage] = {}  # so that what is outside is looked at once

    def _once(self, stage: Made) -> Made:
        return self._made.setdefault(stage.instance, stage)  # type: ignore[return-value]

    def gallery(self, name: str) -> Stage:
        """`ingest:<gallery>`; the gallery `evaluate` comes from the evaluate section."""
        if name == "evaluate":
            return self._evaluated()
        source, field = self.ingest.galleries[name], f"ingest.galleries.{name}"
        images = Source(f"{field}.images", source.images, kept=not source.copy_images)
        without = None if source.without is None else Source(f"{field}.without", source.without)
        return self._gallery(name, images, _each(f"{field}.split", source.splits), without)

    @property
    def _checks(self) -> Checks:
        options, resources = self.ingest, self.config.resources.ingest
        return Checks(
            shard_rows=options.shard_rows,
            shard_bytes=options.shard_bytes,
            max_pixels=options.max_pixels,
            max_reject_fraction=self.limit,
            resources=resources,
        )

    def _gallery(self, name: str, images: Source, splits: tuple[Source, ...], without: Source | None = None) -> Stage:
        return self._once(
            IngestGallery(
                name=name,
                images=images,
                splits=splits,
                without=without,
                **self._checks,
            )
        )

    def _evaluated(self) -> Stage:
        section = self.evaluate
        assert section.images is not None
        if not section.is_official:
            split = () if section.split is None else (Source("evaluate.split", section.split),)
            return self._gallery("evaluate", Source("evaluate.images", section.images), split)
        return self._once(
            IngestImages(
                name="evaluate",
                images=Source("evaluate.images", section.images, kept=True),
                annotations=self._annotations,
                **self._checks,
            )
        )

    @property
    def _annotations(self) -> Annotations:
        section = self.evaluate
        assert section.annotations is not None
        return Annotations("evaluate.annotations", section.annotations, benchmark=section.benchmark, part=section.part)

    @property
    def benchmark(self) -> Annotations | None:
        """The files of an official benchmark."""
        return self._annotations if self.evaluate.is_official else None

    def triplets(self, name: str) -> Stage:
        """`ingest:<triplets>`; the triplets `queries` come from the evaluate section."""
        if name == "queries" and self.evaluate.is_official:
            return self._once(IngestQueries(name=name, annotations=self._annotations, max_reject_fraction=self.limit))
        if name == "queries":
            assert self.evaluate.triplets is not None
            source = TripletsConfig(gallery="evaluate", file=self.evaluate.triplets)
            files = _each("evaluate.triplets", source.files)
        else:
            source = self.ingest.triplets[name]
            files = _each(f"ingest.triplets.{name}.file", source.files)
        return self._once(
            IngestTriplets(
                name=name,
                gallery=self.gallery(source.gallery),
                files=files,
                join=source.join,
                max_reject_fraction=self.limit,
            )
        )

    def captions(self, name: str) -> Stage:
        """`ingest:<captions>`."""
        source: CaptionsConfig = self.ingest.captions[name]
        return self._once(
            IngestCaptions(
                name=name,
                gallery=self.gallery(source.gallery),
                file=Source(f"ingest.captions.{name}.file", source.file),
                until=source.until,
                max_reject_fraction=self.limit,
            )
        )

    def excluded(self, benchmark: str, source: ExcludeConfig) -> Stage:
        """`ingest:excluded-<benchmark>`: a benchmark's val and test images, and train's where the config says so.

        By name, and as a gallery where they are given.
        """
        name, field = f"excluded-{benchmark}", f"mine.exclude.{benchmark}"
        annotations = Annotations(f"{field}.annotations", source.annotations, benchmark=benchmark, train=source.train)
        if source.images is None:
            return self._once(IngestExcludedNames(name=name, annotations=annotations, max_reject_fraction=self.limit))
        return self._once(
            IngestExcluded(
                name=name,
                images=Source(f"{field}.images", source.images, kept=True),
                annotations=annotations,
                **self._checks,
            )
        )

    def embeddings(self, tower: str, gallery: str) -> Stage:
        """`embed:<tower>.<gallery>`; images to search in are embedded plain, training images in every cached view."""
        views = ViewsConfig() if gallery == "evaluate" else self.config.embed.views_of(tower, gallery)
        return self.embed(tower, gallery, self.gallery(gallery), views)

    def embed(self, tower: str, name: str, gallery: Stage, views: ViewsConfig) -> Stage:
        """`embed:<tower>.<name>` of these images and views."""
        return self._once(
            Embed(
                name=f"{tower}.{name}",
                gallery=gallery,
                tower=self.config.embed.towers[tower],
                views=views,
                resources=self.config.resources.embed,
            )
        )

    def center(self, tower: str, triplets: str) -> Center:
        """`center:<tower>.<triplets>`: one for all models that see labelled images through this tower."""
        return self._once(
            Center(
                name=f"{tower}.{triplets}",
                triplets=self.triplets(triplets),
                embeddings=self.embeddings(tower, self.ingest.triplets[triplets].gallery),
            )
        )

    def seen(self, tower: str | None, *galleries: str, pixels: bool = False) -> Seen:
        """What a tower, or without one a model of its own, sees of some galleries; with `pixels` the images too.

        Raises UserError when a gallery lacks cached views that the first one has, and so are drawn for all.
        """
        names = list(dict.fromkeys(galleries))
        images = tuple(self.gallery(name) for name in names)
        if tower is None:
            return Seen(embeddings=(), galleries=images)
        online = pixels or self.config.embed.views_of(tower, names[0]).online
        if not online:
            self._check_views(tower, names)
        embeddings = tuple(self.embeddings(tower, name) for name in names)
        return Seen(embeddings=embeddings, galleries=images if online else ())

    def _check_views(self, tower: str, galleries: list[str]) -> None:
        first, *others = (self.config.embed.views_of(tower, name).count for name in galleries)
        for name, count in zip(galleries[1:], others, strict=True):
            if count < first:
                raise UserError(
                    f"embed.views_for: '{tower}.{galleries[0]}' and '{tower}.{name}', which a stage reads together, have "
                    f"{first} and {count} cached views; give '{tower}.{name}' as many"
                )


def _each(field: str, paths: list[str]) -> tuple[Source, ...]:
    """A source for each path; of several each has a field of its own."""
    return tuple(Source(field if len(paths) == 1 else f"{field}[{i}]", path) for i, path in enumerate(paths))
