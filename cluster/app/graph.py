"""The graph of a run: every stage instance, made from the config before anything starts.

Each function or class below is a phase, in the order in which `FLOW` names the stages; a stage names its parents and its
part of the config, and nothing else. The paper's method is round 1; in a further round the generator has also learned from
confident deltas of the last. Instances of round 1 have plain names, those of round r end in `.r<r>`.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property
from typing import TypedDict, TypeVar

from cir.benchmarks.official import Annotations, IngestExcluded, IngestExcludedNames, IngestImages, IngestQueries
from cir.config import VariantConfig
from cir.evaluate import Evaluate, EvaluateGiven
from cir.index import Index
from cir.score import Score
from cir.select import Select, SelectOwn
from cir.tasks import TASKS
from cir.train import Train
from cluster.app.config import RunConfig
from cluster.artifacts import Output
from cluster.config import DecodeResources
from cluster.errors import UserError
from cluster.stage import Limit, Source, Stage
from mining.center import Center
from mining.config import CaptionsConfig, ExcludeConfig, TextTower, ViewsConfig
from mining.embed import Embed
from mining.exclude import Exclude
from mining.ingest import IngestCaptions, IngestGallery, IngestTriplets
from mining.mine import Mine, MineLabelled
from mining.neighbours import Neighbours
from vdg.align import Align
from vdg.generate import Generate
from vdg.instruct import Instruct

FLOW: tuple[type[Stage], ...] = (
    IngestGallery,
    Embed,
    Center,
    Exclude,
    Neighbours,
    Mine,
    Align,
    Instruct,
    Generate,
    Score,
    Select,
    Train,
    Evaluate,
)
KINDS = tuple(stage.kind for stage in FLOW)
MADE = (*KINDS, Index.kind)  # all that has outputs
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


class Graph:
    """Every stage instance of a run, known before anything runs: from the config, and the state of the files it names."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.root = config, config.root
        sources = Sources(config)
        rounds = Rounds(config, sources, Generator(config, sources), mined(config, sources))
        self.evaluation = evaluated(config, sources, rounds)
        self.index = indexed(config, sources)

    def output(self, stage: Stage) -> Output:
        """Where a stage's output lives."""
        return stage.output(self.root)

    @cached_property
    def stages(self) -> list[Stage]:
        """All instances, parents before children; of those that could come next, the earliest kind first."""
        waiting = {stage.instance: stage for stage in ancestors(self.evaluation)}
        ordered: dict[str, Stage] = {}
        while waiting:
            ready = [s for s in waiting.values() if all(parent.instance in ordered for parent in s.parents.values())]
            stage = min(ready, key=lambda stage: KINDS.index(stage.kind))
            ordered[stage.instance] = waiting.pop(stage.instance)
        return list(ordered.values())

    @property
    def known(self) -> list[Stage]:
        """All instances, and those that a command beside `vdg run` makes."""
        return self.stages + ([self.index] if self.index else [])

    def __getitem__(self, instance: str) -> Stage:
        """The stage of this name. Raises KeyError."""
        return {stage.instance: stage for stage in self.stages}[instance]

    def select(self, kind: str | None, only: str | None, until: str | None) -> list[Stage]:
        """The instances asked for, and the ancestors they need. Raises UserError when nothing matches."""
        if until is not None and until not in KINDS:
            raise UserError(f"--until {until}: no such stage; stages are {', '.join(KINDS)}")
        last = KINDS.index(until) if until else len(KINDS)
        chosen = [
            stage
            for stage in self.stages
            if kind in (None, stage.kind) and _matches(stage, only or "*") and KINDS.index(stage.kind) <= last
        ]
        if not chosen:
            raise UserError(f"no stage instance matches {only or kind}; `--dry-run` lists them")
        needed = {ancestor.instance for stage in chosen for ancestor in ancestors(stage)}
        return [stage for stage in self.stages if stage.instance in needed]


def _matches(stage: Stage, pattern: str) -> bool:
    """By instance, or by instance and digest as `vdg ls` prints them."""
    return fnmatch(stage.instance, pattern) or fnmatch(f"{stage.instance}-{stage.digest}", pattern)


def ancestors(stage: Stage) -> Iterator[Stage]:
    """Every ancestor once, parents before children, then the stage itself."""
    seen: set[str] = set()

    def visit(node: Stage) -> Iterator[Stage]:
        if node.instance not in seen:
            seen.add(node.instance)
            for parent in node.parents.values():
                yield from visit(parent)
            yield node

    yield from visit(stage)


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
            gallery, files = "evaluate", _each("evaluate.triplets", [self.evaluate.triplets])
        else:
            source = self.ingest.triplets[name]
            gallery, files = source.gallery, _each(f"ingest.triplets.{name}.file", source.files)
        return self._once(IngestTriplets(name=name, gallery=self.gallery(gallery), files=files, max_reject_fraction=self.limit))

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
        """`ingest:excluded-<benchmark>`: its val and test images, by name, and as a gallery where they are given."""
        name, field = f"excluded-{benchmark}", f"mine.exclude.{benchmark}"
        annotations = Annotations(f"{field}.annotations", source.annotations, benchmark=benchmark)
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


def excluding(config: RunConfig, sources: Sources) -> Exclude | None:
    """`exclude:<gallery>`: which images may be mined, where the config keeps benchmarks out of the pairs."""
    mine = config.mine
    if not mine.exclude:
        return None
    benchmarks: dict[str, Stage] = {name: sources.excluded(name, source) for name, source in mine.exclude.items()}
    return Exclude(
        name=mine.gallery,
        gallery=sources.gallery(mine.gallery),
        embeddings=sources.embeddings(mine.tower, mine.gallery),
        benchmarks=benchmarks,
        looks={
            name: sources.embed(mine.tower, f"excluded-{name}", benchmarks[name], ViewsConfig())
            for name, source in mine.exclude.items()
            if source.images is not None
        },
        duplicate_similarity=mine.duplicate_similarity,
        resources=config.resources.exclude,
    )


def neighbours(config: RunConfig, embeddings: Stage, mineable: Stage | None, center: Stage | None) -> Neighbours:
    """`neighbours:<tower>.<gallery>`: as many of each image as the method looks at; matched pairs are by centred cosine."""
    mine = config.mine
    walks = mine.method == "walk"
    return Neighbours(
        name=f"{mine.tower}.{mine.gallery}",
        embeddings=embeddings,
        mineable=mineable,
        top=mine.walk.top if walks else mine.matched.neighbours,
        center=None if walks else center,
        index=mine.index,
        seed=config.seed,
        resources=config.resources.neighbours,
    )


def mined(config: RunConfig, sources: Sources) -> Mine:
    """`mine:<gallery>`: the pairs of the auxiliary gallery's images."""
    mine = config.mine
    embeddings, mineable = sources.embeddings(mine.tower, mine.gallery), excluding(config, sources)
    center = sources.center(mine.tower, mine.triplets) if mine.triplets else None
    return Mine(
        name=mine.gallery,
        embeddings=embeddings,
        neighbours=None if mine.method == "random" else neighbours(config, embeddings, mineable, center),
        mineable=mineable,
        labelled=sources.triplets(mine.triplets) if mine.triplets else None,
        center=center,
        config=mine,
        seed=config.seed,
        resources=config.resources.mine,
    )


class Generator:
    """The Visual Delta Generator: how it is trained on triplets, and what it writes of pairs."""

    def __init__(self, config: RunConfig, sources: Sources) -> None:
        self.config, self.sources, self.tower = config, sources, config.vdg.tower

    @property
    def _center(self) -> Center | None:
        return self.sources.center(self.tower, self.config.instruct.triplets) if self.tower else None

    @property
    def aligned(self) -> Align | None:
        """`align:vdg`, where the config has stage 1."""
        config, section = self.config, self.config.align
        if section is None or self._center is None:
            return None
        return Align(
            name="vdg",
            captions=self.sources.captions(section.captions),
            **self.sources.seen(self.tower, config.ingest.captions[section.captions].gallery),
            center=self._center,
            vdg=config.vdg,
            align=section,
            seed=config.seed,
            resources=config.resources.align,
        )

    def trained(self, round_: int, triplets: Stage) -> Instruct:
        """`instruct:vdg` on these triplets: in round 1 the labelled ones."""
        config = self.config
        galleries = [config.ingest.triplets[config.instruct.triplets].gallery, *([config.mine.gallery] if round_ > 1 else [])]
        return Instruct(
            name=f"vdg{_suffix(round_)}",
            triplets=triplets,
            **self.sources.seen(self.tower, *galleries),
            center=self._center,
            aligned=self.aligned,
            vdg=config.vdg,
            instruct=config.instruct,
            seed=config.seed,
            resources=config.resources.instruct,
        )

    def deltas(self, name: str, generator: Instruct, pairs: Stage, gallery: str) -> Generate:
        """`generate:<name>`: of pairs of a gallery's images."""
        return Generate(
            name=name,
            pairs=pairs,
            vdg=generator,
            **self.sources.seen(self.tower, gallery),
            config=self.config.generate,
            seed=self.config.seed,
            resources=self.config.resources.generate,
        )


class Rounds:
    """Pseudo triplets, their scores and the retrieval models trained on them, round by round."""

    def __init__(self, config: RunConfig, sources: Sources, generator: Generator, pairs: Mine) -> None:
        self.config, self.sources, self.generator, self.pairs = config, sources, generator, pairs

    def vdg(self, round_: int) -> Instruct:
        """The generator of a round."""
        labelled = self.config.instruct.triplets
        return self.generator.trained(round_, self.sources.triplets(labelled) if round_ == 1 else self._confident(round_ - 1))

    def pseudo_triplets(self, round_: int) -> Generate:
        """`generate:<gallery>`."""
        gallery = self.config.mine.gallery
        return self.generator.deltas(f"{gallery}{_suffix(round_)}", self.vdg(round_), self.pairs, gallery)

    def _confident(self, round_: int) -> Select:
        """`select:vdg.r<r>`: the labelled triplets and a round's confident ones, that the next generator learns from.

        They are scored by a model that was trained on the round's own deltas.
        """
        config, selection = self.config, self.config.rounds.selection
        scores = None
        if selection.by_round_trip:
            scores = self._scores(round_, self.model(config.rounds.judge, config.train.seeds[0], round_))
        return Select(
            name=f"vdg{_suffix(round_ + 1)}",
            triplets=self.sources.triplets(config.instruct.triplets),
            pseudo_triplets=self.pseudo_triplets(round_),
            scores=scores,
            selection=selection,
        )

    def _scores(self, round_: int, judge: Train) -> Score:
        """`score:<gallery>.<judge>`: the round trip of every pseudo triplet of a round by one model."""
        config, gallery = self.config, self.config.mine.gallery
        return Score(
            name=f"{gallery}{_suffix(round_)}.{judge.name}",
            pseudo_triplets=self.pseudo_triplets(round_),
            judge=judge,
            embeddings=self.sources.embeddings(config.train.tower, gallery),
            gallery=self.sources.gallery(gallery),
            config=config.score,
            seed=config.seed,
            resources=config.resources.score,
        )

    def model(self, name: str, seed: int, round_: int | None = None) -> Train:
        """`train:<variant>.s<seed>`; of an earlier round than the variant's own, `train:<variant>.r<r>.s<seed>`."""
        config, variant = self.config, self.config.train.variant(name)
        own = variant.round or config.rounds.count
        used = round_ if round_ and variant.pseudo else own
        galleries = [config.ingest.triplets[variant.triplets].gallery, *([config.mine.gallery] if variant.pseudo else [])]
        return Train(
            name=f"{name}{'' if used == own else f'.r{used}'}.s{seed}",
            triplets=self._with_own_deltas(variant.triplets) if variant.own_deltas else self.sources.triplets(variant.triplets),
            **self.sources.seen(config.train.tower, *galleries, pixels=TASKS[variant.model].sees_pixels),
            center=self.sources.center(config.train.tower, config.train.triplets),
            **self._negatives(variant),
            pseudo_triplets=self.pseudo_triplets(used) if variant.pseudo else None,
            scores=self._judged(used, variant) if variant.pseudo else None,
            config=variant,
            seed=seed,
            resources=config.resources.train,
        )

    def _negatives(self, variant: VariantConfig) -> dict[str, Stage | None]:
        """Where a variant's unlabelled negatives are drawn from."""
        if not variant.loss.unlabelled:
            return {}
        embeddings = self.sources.embeddings(self.config.train.tower, self.config.mine.gallery)
        return {"gallery": embeddings, "mineable": excluding(self.config, self.sources)}

    def _with_own_deltas(self, name: str) -> SelectOwn:
        """`select:<triplets>.vdg`: labelled triplets, each with the generator's delta of its pair too (PAPER 2.3)."""
        labelled, gallery = self.sources.triplets(name), self.config.ingest.triplets[name].gallery
        written = self.generator.deltas(name, self.vdg(1), MineLabelled(name=name, triplets=labelled), gallery)
        return SelectOwn(name=f"{name}.vdg", triplets=labelled, pseudo_triplets=written)

    def _judged(self, round_: int, variant: VariantConfig) -> Score | None:
        """Round-trip scores that a variant selects by: by the labelled judge, in later rounds by the semi-supervised one."""
        if not variant.selection.by_round_trip:
            return None
        judge = (self.config.score.judge, 1) if round_ == 1 else (self.config.rounds.judge, round_ - 1)
        return self._scores(round_, self.model(judge[0], self.config.train.seeds[0], judge[1]))

    @property
    def models(self) -> dict[str, Stage]:
        """Every variant with every seed, as `<variant>.s<seed>`."""
        train = self.config.train
        return {f"{name}.s{seed}": self.model(name, seed) for name in train.variants for seed in train.seeds}


def _suffix(round_: int) -> str:
    return "" if round_ == 1 else f".r{round_}"


def evaluated(config: RunConfig, sources: Sources, rounds: Rounds) -> Stage:
    """`evaluate:all`: all models on the gallery and queries of the evaluate section; or given embeddings, without a model."""
    section, resources = config.evaluate, config.resources.evaluate
    queries, annotations = sources.triplets("queries"), sources.benchmark
    if section.embeddings is not None:
        assert annotations is not None
        embeddings = Source("evaluate.embeddings", section.embeddings)
        return EvaluateGiven(
            name="all", queries=queries, annotations=annotations, embeddings=embeddings, config=section, resources=resources
        )
    return Evaluate(
        name="all",
        queries=queries,
        gallery=sources.gallery("evaluate"),
        embeddings=sources.embeddings(config.train.tower, "evaluate"),
        models=rounds.models,
        text=_shared_text(config),
        annotations=annotations,
        attributes=Source("evaluate.attributes", section.attributes) if section.attributes else None,
        config=section,
        resources=resources,
    )


def indexed(config: RunConfig, sources: Sources) -> Index | None:
    """`index:evaluate`: what `vdg search` and `vdg serve` show of the gallery that they search; None without its images."""
    if config.evaluate.images is None:
        return None
    return Index(name="evaluate", gallery=sources.gallery("evaluate"), resources=config.resources.ingest)


def _shared_text(config: RunConfig) -> TextTower | None:
    """The text encoder, where it and the image tower are the two sides of one model of open_clip."""
    tower, text = config.embed.towers[config.train.tower], config.train.text
    if text is None or (tower.library, text.library) != ("open_clip", "open_clip") or tower.weights != text.weights:
        return None
    weights = text.weights  # a hub's name says the architecture too
    return text if weights and (weights.hub or tower.model == text.model) else None
