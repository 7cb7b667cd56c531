"""The graph of a run: every stage instance, made from the config before anything starts.

Each function or class below is a phase, in the order in which `FLOW` names the stages; a stage names its parents and its
part of the config, and nothing else. The paper's method is round 1; in a further round the generator has also learned from
confident deltas of the last. Instances of round 1 have plain names, those of round r end in `.r<r>`. Of several generators
the first has plain names too, those of another with seed s have `.g<s>` before all of that.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cached_property

from cir.candidates import Candidates
from cir.config import RerankConfig, Validation, VariantConfig
from cir.evaluate import Evaluate, EvaluateGiven
from cir.index import Index
from cir.rerank import RERANKED, Rerank
from cir.score import Score
from cir.select import Select, SelectFold, SelectOwn
from cir.tasks import TASKS
from cir.train import Train
from cluster.app.config import RunConfig
from cluster.app.sources import Sources
from cluster.artifacts import Output
from cluster.errors import UserError
from cluster.stage import Source, Stage
from mining.center import Center
from mining.config import TextTower, ViewsConfig
from mining.embed import Embed
from mining.exclude import Exclude
from mining.ingest import IngestGallery
from mining.mine import Mine, MineLabelled
from mining.neighbours import Neighbours
from vdg.align import Align
from vdg.generate import Generate
from vdg.instruct import Instruct
from vdg.likelihood import Likelihood

FLOW: tuple[type[Stage], ...] = (
    IngestGallery,  # `Sources`, in `sources.py`: galleries, triplets, captions,
    Embed,  # what a tower sees of their images,
    Center,  # and the mean of the labelled ones
    Exclude,  # `mined`: which images may be paired,
    Neighbours,  # what lies near each of them,
    Mine,  # and the pairs
    Align,  # `Generator`: stage 1,
    Instruct,  # stage 2,
    Generate,  # and the deltas of pairs
    Score,  # `Rounds`: the round trip of each delta,
    Select,  # the triplets that a later generator learns from,
    Train,  # and the retrieval models
    Evaluate,  # `evaluated`
    Candidates,  # `reranked`: what a generator reads of its rankings,
    Likelihood,  # what it thinks of each,
    Rerank,  # and the rankings again
)
Train.loader = "cluster.app.registered"  # a model's tower is named by a run's config, which is known here alone
KINDS = tuple(stage.kind for stage in FLOW)
MADE = (*KINDS, Index.kind)  # all that has outputs


class Graph:
    """Every stage instance of a run, known before anything runs: from the config, and the state of the files it names."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.root = config, config.root
        sources = Sources(config)
        pairs = mined(config, sources)
        rounds = [Rounds(config, sources, Generator(config, sources, seed), pairs) for seed in config.instruct.seeds]
        self.evaluation = evaluated(config, sources, rounds, folds(config, sources, pairs))
        self.results: Stage = self.evaluation  # whose figures are the run's
        if config.evaluate.rerank and isinstance(self.evaluation, Evaluate):
            self.results = reranked(config, config.evaluate.rerank, rounds, self.evaluation)
        self.index: Index | None = None  # what `vdg search` and `vdg serve` show of the gallery that they search
        if config.evaluate.images is not None:
            self.index = Index(name="evaluate", gallery=sources.gallery("evaluate"), resources=config.resources.ingest)
        self.round_trip = rounds[0].round_trip

    def output(self, stage: Stage) -> Output:
        """Where a stage's output lives."""
        return stage.output(self.root)

    @cached_property
    def stages(self) -> list[Stage]:
        """All instances, parents before children; of those that could come next, the earliest kind first."""
        waiting = {stage.instance: stage for stage in ancestors(self.results)}
        ordered: dict[str, Stage] = {}
        while waiting:
            ready = [s for s in waiting.values() if all(parent.instance in ordered for parent in s.parents.values())]
            stage = min(ready, key=lambda stage: KINDS.index(stage.kind))
            ordered[stage.instance] = waiting.pop(stage.instance)
        return list(ordered.values())

    @property
    def models(self) -> Mapping[str, Stage]:
        """The models that are evaluated, by their names (cir.train.ModelName)."""
        return self.evaluation.models if isinstance(self.evaluation, Evaluate) else {}

    @property
    def beside(self) -> list[Stage]:
        """What `vdg serve` and its like make of a finished run, where it is not a part of the run."""
        names = {stage.instance for stage in self.stages}
        return [stage for stage in (self.index, self.round_trip) if stage and stage.instance not in names]

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
    """The Visual Delta Generator of a seed: how it is trained on triplets, and what it writes of pairs.

    It has not seen the `fold` of its triplets.
    """

    def __init__(self, config: RunConfig, sources: Sources, seed: int, fold: Validation | None = None) -> None:
        self.config, self.sources, self.tower, self.seed, self.fold = config, sources, config.vdg.tower, seed, fold
        self.of_seed = "" if seed == config.instruct.seeds[0] else f".g{seed}"
        self.of_fold = f".f{fold.fold}" if fold else ""

    def suffix(self, round_: int = 1) -> str:
        """What the names of its instances end in, in a round."""
        return self.of_seed + self.of_fold + ("" if round_ == 1 else f".r{round_}")

    @property
    def labelled(self) -> Stage:
        """The triplets that it learns from in the first round."""
        name = self.config.instruct.triplets
        triplets = self.sources.triplets(name)
        return SelectFold(name=f"{name}{self.of_fold}", triplets=triplets, without=self.fold) if self.fold else triplets

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
            name=f"vdg{self.of_seed}",
            captions=self.sources.captions(section.captions),
            **self.sources.seen(self.tower, config.ingest.captions[section.captions].gallery),
            center=self._center,
            vdg=config.vdg,
            align=section,
            seed=self.seed,
            resources=config.resources.align,
        )

    def trained(self, round_: int, triplets: Stage) -> Instruct:
        """`instruct:vdg` on these triplets: in round 1 the labelled ones."""
        config = self.config
        galleries = [config.ingest.triplets[config.instruct.triplets].gallery, *([config.mine.gallery] if round_ > 1 else [])]
        return Instruct(
            name=f"vdg{self.suffix(round_)}",
            triplets=triplets,
            **self.sources.seen(self.tower, *galleries),
            center=self._center,
            aligned=self.aligned,
            vdg=config.vdg,
            instruct=config.instruct,
            seed=self.seed,
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
            seed=self.seed,
            resources=self.config.resources.generate,
        )

    def likelihood(self, generator: Instruct, triplets: Stage, gallery: str) -> Likelihood:
        """`likelihood:vdg`: of the texts of triplets of a gallery's images."""
        config = self.config
        return Likelihood(
            name=generator.name,
            triplets=triplets,
            vdg=generator,
            **self.sources.seen(self.tower, gallery),
            batch_size=config.generate.batch_size,
            precision=config.generate.precision,
            resources=config.resources.generate,
        )


class Rounds:
    """A generator's pseudo triplets, their scores and the retrieval models trained on them, round by round."""

    def __init__(self, config: RunConfig, sources: Sources, generator: Generator, pairs: Mine) -> None:
        self.config, self.sources, self.generator, self.pairs = config, sources, generator, pairs
        self._trained: dict[int, Instruct] = {}  # else each round would ask several times for the one before it

    def vdg(self, round_: int) -> Instruct:
        """The generator of a round."""
        if round_ not in self._trained:
            triplets = self.generator.labelled if round_ == 1 else self._confident(round_ - 1)
            self._trained[round_] = self.generator.trained(round_, triplets)
        return self._trained[round_]

    def pseudo_triplets(self, round_: int) -> Generate:
        """`generate:<gallery>`."""
        gallery = self.config.mine.gallery
        return self.generator.deltas(f"{gallery}{self.generator.suffix(round_)}", self.vdg(round_), self.pairs, gallery)

    def _confident(self, round_: int) -> Select:
        """`select:vdg.r<r>`: the labelled triplets and a round's confident ones, that the next generator learns from.

        They are scored by a model that was trained on the round's own deltas.
        """
        config, selection = self.config, self.config.rounds.selection
        scores = None
        if selection.by_round_trip:
            scores = self._scores(round_, self.model(config.rounds.judge, config.train.seeds[0], round_))
        return Select(
            name=f"vdg{self.generator.suffix(round_ + 1)}",
            triplets=self.generator.labelled,
            pseudo_triplets=self.pseudo_triplets(round_),
            scores=scores,
            selection=selection,
        )

    def _scores(self, round_: int, judge: Train) -> Score:
        """`score:<gallery>.<judge>`: the round trip of every pseudo triplet of a round by one model."""
        config, gallery = self.config, self.config.mine.gallery
        return Score(
            name=f"{gallery}{self.generator.suffix(round_)}.{judge.name}",
            pseudo_triplets=self.pseudo_triplets(round_),
            judge=judge,
            embeddings=self.sources.embeddings(config.train.tower, gallery),
            gallery=self.sources.gallery(gallery),
            config=config.score,
            seed=config.seed,
            resources=config.resources.score,
        )

    def model(self, name: str, seed: int, round_: int | None = None) -> Train:
        """`train:<variant>.s<seed>`; of an earlier round than the variant's own, `train:<variant>.r<r>.s<seed>`.

        A model that has seen nothing of a generator is one for all of them.
        """
        config, variant = self.config, self.config.train.variant(name)
        own = variant.round or config.rounds.count
        used = round_ if round_ and variant.pseudo else own
        galleries = [config.ingest.triplets[variant.triplets].gallery, *([config.mine.gallery] if variant.pseudo else [])]
        generator = self.generator.suffix() if variant.uses_generator else self.generator.of_fold
        return Train(
            name=f"{name}{generator}{'' if used == own else f'.r{used}'}.s{seed}",
            triplets=self._with_own_deltas(variant) if variant.own_deltas else self.sources.triplets(variant.triplets),
            **self.sources.seen(config.train.tower, *galleries, pixels=TASKS[variant.model].sees_pixels),
            center=self.sources.center(config.train.tower, config.train.triplets),
            gallery=self.sources.embeddings(config.train.tower, config.mine.gallery) if variant.loss.unlabelled else None,
            mineable=excluding(config, self.sources) if variant.loss.unlabelled else None,
            pseudo_triplets=self.pseudo_triplets(used) if variant.pseudo else None,
            scores=self._judged(used, variant) if variant.pseudo else None,
            config=variant,
            seed=seed,
            resources=config.resources.train,
        )

    @property
    def round_trip(self) -> Score | None:
        """`score:<gallery>.<judge>` of round 1: which deltas to show people follows from it. None without deltas or a judge."""
        config, variants = self.config, [self.config.train.variant(name) for name in self.config.train.variants]
        if config.score.judge not in config.train.variants or not any(variant.pseudo for variant in variants):
            return None
        return self._scores(1, self.model(config.score.judge, config.train.seeds[0], 1))

    def own_deltas(self, name: str, gallery: str) -> Generate:
        """`generate:<triplets>`: the generator's deltas of their pairs."""
        pairs = MineLabelled(name=name, triplets=self.sources.triplets(name))
        return self.generator.deltas(f"{name}{self.generator.suffix()}", self.vdg(1), pairs, gallery)

    def _with_own_deltas(self, variant: VariantConfig) -> SelectOwn:
        """`select:<triplets>.vdg`: labelled triplets, each with the generator's delta of its pair too (PAPER 2.3)."""
        name, alone = variant.triplets, not variant.human_deltas
        return SelectOwn(
            name=f"{name}.vdg{self.generator.suffix()}{'-alone' if alone else ''}",
            triplets=self.sources.triplets(name),
            pseudo_triplets=self.own_deltas(name, self.config.ingest.triplets[name].gallery),
            alone=alone,
        )

    def _judged(self, round_: int, variant: VariantConfig) -> Score | None:
        """Round-trip scores that a variant selects by: by the labelled judge, in later rounds by the semi-supervised one."""
        if not variant.selection.by_round_trip:
            return None
        judge = (self.config.score.judge, 1) if round_ == 1 else (self.config.rounds.judge, round_ - 1)
        return self._scores(round_, self.model(judge[0], self.config.train.seeds[0], judge[1]))


def folds(config: RunConfig, sources: Sources, pairs: Mine) -> dict[str, Stage]:
    """Variants that could be recommended with the first seeds, trained without each fold, as `<variant>.f<fold>`."""
    train, found = config.train, dict[str, Stage]()
    for fold in range(config.evaluate.folds):
        held_out = Validation(folds=config.evaluate.folds, fold=fold)
        without = config.model_copy(update={"train": train.model_copy(update={"validation": held_out})})
        rounds = Rounds(without, sources, Generator(without, sources, config.instruct.seeds[0], held_out), pairs)
        found |= {f"{name}.f{fold}": rounds.model(name, train.seeds[0]) for name in config.rivals}
    return found


def evaluated(config: RunConfig, sources: Sources, rounds: list[Rounds], folds: dict[str, Stage]) -> Stage:
    """`evaluate:all`: all models on the gallery and queries of the evaluate section; or given embeddings, without a model."""
    section, resources = config.evaluate, config.resources.evaluate
    queries, annotations = sources.triplets("queries"), sources.benchmark
    if section.embeddings is not None:
        assert annotations is not None
        embeddings = Source("evaluate.embeddings", section.embeddings)
        return EvaluateGiven(
            name="all", queries=queries, annotations=annotations, embeddings=embeddings, config=section, resources=resources
        )
    train = config.train  # every variant with every seed, of every generator that it uses
    models = [one.model(name, seed) for name in train.variants for one in rounds for seed in train.seeds]
    return Evaluate(
        name="all",
        queries=queries,
        gallery=sources.gallery("evaluate"),
        embeddings=sources.embeddings(config.train.tower, "evaluate"),
        models={model.name: model for model in models},
        folds=folds,
        text=_shared_text(config),
        deltas=rounds[0].own_deltas("queries", "evaluate") if section.own_deltas else None,
        annotations=annotations,
        attributes=Source("evaluate.attributes", section.attributes) if section.attributes else None,
        config=section,
        resources=resources,
    )


def reranked(config: RunConfig, section: RerankConfig, rounds: list[Rounds], evaluation: Evaluate) -> Rerank:
    """`rerank:all`: the variants that could be recommended, each by every generator that it uses, or by all of them."""
    ranks = {
        f"{variant}{RERANKED}{one.generator.suffix()}.s{seed}": (one, one.model(variant, seed).name)
        for variant in config.rivals
        for one in rounds
        for seed in config.train.seeds
    }
    models = {name: model for name, (_, model) in ranks.items()}
    top = Candidates(name="all", evaluation=evaluation, models=tuple(dict.fromkeys(models.values())), top=section.top)
    likelihoods = {one: one.generator.likelihood(one.vdg(1), top, "evaluate") for one in rounds}
    return Rerank(
        name="all",
        evaluation=evaluation,
        models=models,
        likelihoods={name: likelihoods[one] for name, (one, _) in ranks.items()},
        config=section,
    )


def _shared_text(config: RunConfig) -> TextTower | None:
    """The text encoder, where it and the image tower are the two sides of one model of open_clip."""
    tower, text = config.embed.towers[config.train.tower], config.train.text
    if text is None or (tower.library, text.library) != ("open_clip", "open_clip") or tower.weights != text.weights:
        return None
    weights = text.weights  # a hub's name says the architecture too
    return text if weights and (weights.hub or tower.model == text.model) else None
