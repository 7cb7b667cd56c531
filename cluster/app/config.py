"""The config of a run: one section a stage, and a separate section for resources."""

import re
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from cir.config import EvaluateConfig, RoundsConfig, ScoreConfig, TrainConfig, merge
from cluster.config import (
    FOLDER,
    NOT_CONTENT,
    ActorResources,
    DecodeResources,
    EmbedResources,
    Section,
    Seed,
    Seeds,
    TaskResources,
    WorkerResources,
    in_folder,
    override,
    path_field,
    read_yaml,
    validate,
)
from cluster.driver.session import RayConfig
from cluster.errors import UserError
from mining.config import CaptionsConfig, EmbedConfig, IngestConfig, MineConfig, TripletsConfig
from vdg.config import AlignConfig, GenerateConfig, InstructConfig, VdgConfig

PROJECT = Path(__file__).parents[2]
PRESETS = Path(__file__).parent / "presets"


class VdgSection(VdgConfig):
    """The generator, and the image tower it sees through."""

    tower: str | None = Field(None, description="features, chooser: name of a tower of embed.towers")

    @model_validator(mode="after")
    def _features_need_a_tower(self) -> Self:
        if self.backbone != "image_text" and self.tower is None:
            raise ValueError(f"tower: backbone '{self.backbone}' needs the name of a tower of embed.towers")
        if self.backbone == "image_text" and self.tower is not None:
            raise ValueError(f"tower: backbone 'image_text' sees with its own; found {self.tower!r}, set it to null")
        return self


class AlignSection(AlignConfig):
    """Stage 1 of the generator."""

    captions: str = Field(description="name of a file of ingest.captions")


class InstructSection(InstructConfig):
    """Stage 2 of the generator."""

    triplets: str = Field(description="name of a file of ingest.triplets")
    seeds: Seeds = Field(
        [0],
        json_schema_extra=NOT_CONTENT,
        description="a generator is trained with each, and with each generator every variant that uses one",
    )


class TrainSection(TrainConfig):
    """The retrieval models, and the image tower they see through."""

    tower: str = Field(description="name of a tower of embed.towers")


def _path(description: str) -> Any:
    """A field that says where something lies, which never decides what comes out: its stage fingerprints what is there."""
    return path_field(description, None, **NOT_CONTENT)


class EvaluateSection(EvaluateConfig):
    """The gallery and queries that every model is scored on."""

    images: str | None = _path("as in ingest.galleries; not read where embeddings are given")
    split: str | None = _path("of 'triplets': as in ingest.galleries")
    triplets: str | None = _path("of 'triplets', the queries: reference, target, captions, optional group")
    attributes: str | None = _path("of 'triplets', JSON of key to attributes: every image with the target's is right")
    annotations: str | None = _path("folder of a benchmark's own files, laid out as they are published")
    embeddings: str | None = _path("Parquet of a benchmark's vectors (kind, key, vector), scored without a model")

    @model_validator(mode="after")
    def _fields_fit_the_benchmark(self) -> Self:
        own, official = ["images", "triplets", "split", "attributes"], ["annotations", "embeddings"]
        if self.benchmark == "triplets":
            needed, forbidden = own[:2], official
        else:
            needed = ["annotations"] + ([] if self.embeddings else ["images"])
            forbidden = own[1:]
        if self.own_deltas and self.embeddings:
            raise ValueError("'own_deltas' needs models: given embeddings are of queries as they are")
        if self.rerank and self.embeddings:
            raise ValueError("'rerank' needs models: a generator reads the queries that they ranked; set it to null")
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"benchmark '{self.benchmark}' needs '{name}'")
        for name in forbidden:
            if getattr(self, name) is not None:
                raise ValueError(f"'{name}' is not for benchmark '{self.benchmark}': set it to null")
        return self

    @property
    def scores_models(self) -> bool:
        """Whether there are figures of trained models to report."""
        return self.part == "val" and self.embeddings is None


class ReportConfig(Section):
    """How much the report shows."""

    examples: int = Field(8, gt=0, description="pseudo triplets and retrieval examples shown")
    seed: Seed = Field(0, description="of the examples drawn")
    attributes: str | None = _path(
        "JSON of key to attributes of mine.gallery's photos, by which the precision of the deltas is told; nothing else sees it"
    )


class TrackingConfig(Section):
    """Where MLflow records runs. Never part of a digest."""

    uri: str | None = Field(None, description="MLflow tracking URI; None: SQLite in the root")
    experiment: str = Field("vdg", min_length=1, max_length=200, description="name of MLflow's experiment")

    @field_validator("uri")
    @classmethod
    def _is_kept(cls, uri: str | None) -> str | None:
        """SQLite without a file lives in memory."""
        if uri is not None and (not uri.strip() or re.fullmatch(r"sqlite:/{0,3}(:memory:)?", uri)):
            raise ValueError(
                f"{uri!r} keeps no record after the run: name a file (sqlite:///records.db) or a server, or leave it out"
            )
        return uri


class RunResources(Section):
    """What each stage may use. Never part of a digest: another cluster, the same outputs."""

    ray: RayConfig = RayConfig()
    stages: int | None = Field(None, ge=1, description="stages at a time; None: as many as Ray has CPUs and GPUs for")
    ingest: DecodeResources = DecodeResources()
    embed: EmbedResources = EmbedResources()
    exclude: ActorResources = ActorResources()
    neighbours: ActorResources = ActorResources()
    mine: TaskResources = TaskResources()
    align: WorkerResources = WorkerResources()
    instruct: WorkerResources = WorkerResources()
    generate: ActorResources = ActorResources()
    score: ActorResources = ActorResources()
    train: WorkerResources = WorkerResources()
    evaluate: ActorResources = ActorResources()
    serve: ActorResources = ActorResources()  # of `vdg serve --ray`: an actor is a replica


class RunConfig(Section):
    """A whole run."""

    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=64, description="names the folder of the report and the MLflow run")
    root: str = path_field("folder or URI that holds every output", "outputs")
    seed: Seed = Field(0, description="of mining; generators have instruct.seeds, retrieval models train.seeds")
    ingest: IngestConfig
    embed: EmbedConfig
    mine: MineConfig
    vdg: VdgSection
    align: AlignSection | None = Field(None, description="None: the projection starts untrained")
    instruct: InstructSection
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    rounds: RoundsConfig = RoundsConfig()
    train: TrainSection
    evaluate: EvaluateSection
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()
    resources: RunResources = RunResources()
    sources: dict[str, str] = Field(
        {}, description="where to get what comes from outside: a field, or the start of several -> a sentence for who lacks it"
    )

    @field_validator("root")
    @classmethod
    def _root_names_a_place(cls, root: str) -> str:
        if re.fullmatch(r"[^:/]+:/+", root):
            raise ValueError("a URI names a bucket or a folder, such as s3://bucket/outputs")
        return root

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for field, name, known in self._references():
            if name not in known:
                raise ValueError(f"{field}: {name!r} is not defined; known are {sorted(known)}")
        names = ["evaluate", "queries", *self.ingest.galleries, *self.ingest.triplets, *self.ingest.captions]
        names += [f"excluded-{benchmark}" for benchmark in self.mine.exclude]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"ingest: two sources have the name '{twice[0]}' ('evaluate' and 'queries' are taken); rename one")
        given: dict[str, Iterable[str]] = {
            "embed.towers": self.embed.towers,
            "train.variants": self.train.variants,
            "ingest": names,
        }
        for section, name in ((section, name) for section, names in given.items() for name in names):
            if not re.fullmatch(FOLDER, name):
                raise ValueError(
                    f"{section}: the name {name!r} is part of a folder's name: use up to 64 letters, digits, '_' and '-'"
                )
        return self

    @model_validator(mode="after")
    def _blip_sees_through_itself(self) -> Self:
        tower = self.embed.towers[self.train.tower]
        for name in self.train.variants:
            if self.train.variant(name).model == "blip" and tower.output != "projected":
                raise ValueError(
                    f"train.variants.{name}: model 'blip' needs a train.tower with output: projected, the weights of a BLIP "
                    f"retrieval model; '{self.train.tower}' has output: {tower.output}"
                )
        return self

    @model_validator(mode="after")
    def _fits_the_backbone(self) -> Self:
        if self.align and self.vdg.backbone != "features":
            raise ValueError(f"align: backbone '{self.vdg.backbone}' has no projection to align; set align to null")
        views = self.embed.views_of(self.vdg.tower, self.mine.gallery) if self.vdg.tower else None
        if self.generate.views and views and not (views.online or views.count > 1):
            raise ValueError("generate.views: the plain view alone is cached; set embed.views.count above 1 or online")
        return self

    @model_validator(mode="after")
    def _judges_can_judge(self) -> Self:
        train, chosen = self.train, [self.train.variant(name).selection for name in self.train.variants]
        for name in train.variants:
            if (train.variant(name).round or 1) > self.rounds.count:
                raise ValueError(f"train.variants.{name}.round: there are {self.rounds.count} round(s); raise rounds.count")
        if any(selection.by_round_trip for selection in chosen):
            self._check_judge("score.judge", self.score.judge, pseudo=False)
        if self.rounds.count > 1:
            self._check_judge("rounds.judge", self.rounds.judge, pseudo=True)
        return self

    @model_validator(mode="after")
    def _rerank_has_rankings(self) -> Self:
        if self.evaluate.rerank and not self.rivals:
            raise ValueError(f"evaluate.rerank: no variant is '{self.evaluate.baseline}' (evaluate.baseline); set it to null")
        return self

    def _check_judge(self, field: str, name: str, pseudo: bool) -> None:
        if name not in self.train.variants:
            raise ValueError(f"{field}: {name!r} is not one of train.variants, {sorted(self.train.variants)}")
        if self.train.variant(name).pseudo != pseudo:
            raise ValueError(f"{field}: '{name}' must {'' if pseudo else 'not '}be trained on pseudo triplets")

    @property
    def rivals(self) -> list[str]:
        """The variants one of which is recommended: the baseline, and those that learn from the same labels; no controls."""
        variants = {name: self.train.variant(name) for name in self.train.variants}
        if (baseline := variants.get(self.evaluate.baseline)) is None:
            return []
        return [name for name, one in variants.items() if one.triplets == baseline.triplets and not one.is_control]

    def _references(self) -> Iterator[tuple[str, str, Any]]:
        """(field, name it gives, names it may give)."""
        galleries, triplets, towers = self.ingest.galleries, self.ingest.triplets, self.embed.towers
        files: dict[str, TripletsConfig | CaptionsConfig] = {**triplets, **self.ingest.captions}
        yield from ((f"ingest.{name}.gallery", source.gallery, galleries) for name, source in files.items())
        yield "mine.gallery", self.mine.gallery, galleries
        named: list[tuple[str, str, Any]] = [("tower", one, towers) for one in ("mine", "train", "vdg")]
        for field, one, known in [*named, *(("triplets", one, triplets) for one in ("train", "instruct", "mine"))]:
            if (name := getattr(getattr(self, one), field)) is not None:
                yield f"{one}.{field}", name, known
        if self.align:
            yield "align.captions", self.align.captions, self.ingest.captions
        for variant in self.train.variants:
            yield f"train.variants.{variant}.triplets", self.train.variant(variant).triplets, triplets


def load(config: str, assignments: list[str]) -> RunConfig:
    """A run config from a file or a preset's name, with `section.field=value` assignments put over it.

    Raises UserError naming each wrong field.
    """
    return validate(RunConfig, override(read_config(config), assignments), config)


def read_config(config: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a config file or preset, put over the presets and files that it `extends`, later ones over earlier.

    A relative path in a file starts at the file, one in a preset at the current folder.

    Raises UserError where there is no such file or preset, and where it extends itself (`above`: those that extend it).
    """
    if config in above:
        raise UserError(f"extends: {' -> '.join([*above, config])} comes back to itself; take one of them out")
    preset = PRESETS / f"{config}.yaml"
    is_preset = preset.exists() and not Path(config).is_file()
    if not is_preset and not config.endswith((".yaml", ".yml")):
        raise UserError(f"{config}: neither a YAML file nor a preset; `vdg presets` lists the presets")
    content = read_yaml(preset if is_preset else Path(config))
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{config}: extends: found {bases!r}, expected a preset's name, a YAML file, or a list of them")
    if not is_preset:
        folder = Path(config).resolve().parent
        content = in_folder(RunConfig, content, folder)
        bases = [str(folder / base) if base.endswith((".yaml", ".yml")) else base for base in bases]
    layers = [read_config(base, (*above, config)) for base in bases]
    return _in_project(reduce(merge, [*layers, content]))


def _in_project(node: Any) -> Any:
    """Presets name the bundled photos as `{project}/...`, so that they run from any folder."""
    if isinstance(node, dict):
        return {name: _in_project(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_in_project(value) for value in node]
    return node.replace("{project}", str(PROJECT)) if isinstance(node, str) else node


def presets() -> dict[str, str]:
    """Name and first comment line of every preset."""
    return {path.stem: path.read_text().split("\n", 1)[0].lstrip("# ") for path in sorted(PRESETS.glob("*.yaml"))}
