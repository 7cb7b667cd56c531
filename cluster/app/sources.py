"""What enters a run from outside, and what the image towers make of it: ingest, embed and center, where the graph begins."""

from typing import Any, TypedDict, TypeVar

from cir.benchmarks.official import Annotations, IngestExcluded, IngestExcludedNames, IngestImages, IngestQueries
from cluster.app.config import RunConfig
from cluster.errors import UserError
from cluster.stage import Limit, Source, Stage
from mining.center import Center
from mining.config import ExcludeConfig, TripletsConfig, ViewsConfig
from mining.embed import Embed
from mining.ingest import IngestCaptions, IngestGallery, IngestTriplets

StageT = TypeVar("StageT", bound=Stage)


class Seen(TypedDict):
    """What a stage sees of some galleries' images: their embeddings, their pixels, or both."""

    embeddings: tuple[Stage, ...]
    galleries: tuple[Stage, ...]


class Sources:
    """What enters a run from outside, and what the image towers make of it."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.ingest, self.evaluate = config, config.ingest, config.evaluate
        self.limit = Limit(config.ingest.max_reject_fraction)
        self._made: dict[str, Stage] = {}  # so that what is outside is looked at once

    def _once(self, stage: StageT) -> StageT:
        return self._made.setdefault(stage.instance, stage)  # type: ignore[return-value]

    def gallery(self, name: str) -> Stage:
        """`ingest:<gallery>`; the gallery `evaluate` comes from the evaluate section."""
        if name == "evaluate":
            return self._evaluated()
        source, field = self.ingest.galleries[name], f"ingest.galleries.{name}"
        images = Source(f"{field}.images", source.images, kept=not source.copy_images)
        without = None if source.without is None else Source(f"{field}.without", source.without)
        splits = _each(f"{field}.split", source.split or [])
        return self._once(IngestGallery(name=name, images=images, splits=splits, without=without, **self._checks))

    @property
    def _checks(self) -> dict[str, Any]:
        """How a gallery's images are checked, and in which parts they are kept."""
        options = {name: getattr(self.ingest, name) for name in ("shard_rows", "shard_bytes", "max_pixels")}
        return {**options, "max_reject_fraction": self.limit, "resources": self.config.resources.ingest}

    def _evaluated(self) -> Stage:
        section, field = self.evaluate, "evaluate.images"
        assert section.images is not None
        if section.is_official:
            images = Source(field, section.images, kept=True)
            return self._once(IngestImages(name="evaluate", images=images, annotations=self._annotations, **self._checks))
        split = () if section.split is None else (Source("evaluate.split", section.split),)
        return self._once(IngestGallery(name="evaluate", images=Source(field, section.images), splits=split, **self._checks))

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
            source, field = TripletsConfig(gallery="evaluate", file=self.evaluate.triplets), "evaluate.triplets"
        else:
            source, field = self.ingest.triplets[name], f"ingest.triplets.{name}.file"
        gallery, files = self.gallery(source.gallery), _each(field, source.file)
        made = IngestTriplets(name=name, gallery=gallery, files=files, join=source.join, max_reject_fraction=self.limit)
        return self._once(made)

    def captions(self, name: str) -> Stage:
        """`ingest:<captions>`."""
        source, limit = self.ingest.captions[name], self.limit
        gallery, file = self.gallery(source.gallery), Source(f"ingest.captions.{name}.file", source.file)
        return self._once(IngestCaptions(name=name, gallery=gallery, file=file, until=source.until, max_reject_fraction=limit))

    def excluded(self, benchmark: str, source: ExcludeConfig) -> Stage:
        """`ingest:excluded-<benchmark>`: a benchmark's val and test images, and train's where the config says so.

        By name, and as a gallery where they are given.
        """
        name, field = f"excluded-{benchmark}", f"mine.exclude.{benchmark}"
        annotations = Annotations(f"{field}.annotations", source.annotations, benchmark=benchmark, train=source.train)
        if source.images is None:
            return self._once(IngestExcludedNames(name=name, annotations=annotations, max_reject_fraction=self.limit))
        images = Source(f"{field}.images", source.images, kept=True)
        return self._once(IngestExcluded(name=name, images=images, annotations=annotations, **self._checks))

    def embeddings(self, tower: str, gallery: str) -> Stage:
        """`embed:<tower>.<gallery>`; images to search in are embedded plain, training images in every cached view."""
        views = ViewsConfig() if gallery == "evaluate" else self.config.embed.views_of(tower, gallery)
        return self.embed(tower, gallery, self.gallery(gallery), views)

    def embed(self, tower: str, name: str, gallery: Stage, views: ViewsConfig) -> Stage:
        """`embed:<tower>.<name>` of these images and views."""
        config, resources = self.config.embed.towers[tower], self.config.resources.embed
        return self._once(Embed(name=f"{tower}.{name}", gallery=gallery, tower=config, views=views, resources=resources))

    def center(self, tower: str, triplets: str) -> Center:
        """`center:<tower>.<triplets>`: one for all models that see labelled images through this tower."""
        embeddings = self.embeddings(tower, self.ingest.triplets[triplets].gallery)
        return self._once(Center(name=f"{tower}.{triplets}", triplets=self.triplets(triplets), embeddings=embeddings))

    def seen(self, tower: str | None, *galleries: str, pixels: bool = False) -> Seen:
        """What a tower, or without one a model of its own, sees of some galleries; with `pixels` the images too.

        Raises UserError when a gallery lacks cached views that the first one has, and so are drawn for all.
        """
        names = list(dict.fromkeys(galleries))
        images = tuple(self.gallery(name) for name in names)
        if tower is None:
            return Seen(embeddings=(), galleries=images)
        online = pixels or self.config.embed.views_of(tower, names[0]).online
        views = {name: self.config.embed.views_of(tower, name).count for name in names}
        if not online and (fewer := [name for name in names if views[name] < views[names[0]]]):
            raise UserError(
                f"embed.views_for: '{tower}.{names[0]}' and '{tower}.{fewer[0]}', which a stage reads together, have "
                f"{views[names[0]]} and {views[fewer[0]]} cached views; give '{tower}.{fewer[0]}' as many"
            )
        embeddings = tuple(self.embeddings(tower, name) for name in names)
        return Seen(embeddings=embeddings, galleries=images if online else ())


def _each(field: str, paths: list[str]) -> tuple[Source, ...]:
    """A source for each path; of several each has a field of its own."""
    return tuple(Source(field if len(paths) == 1 else f"{field}[{i}]", path) for i, path in enumerate(paths))
