"""The graph of stage instances of a run, made from its config before anything starts."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from cir.benchmarks import official, triplets
from cir.benchmarks.benchmark import Benchmark
from cir.config import TextTower
from cir.evaluate import EVALUATE_VERSION, evaluate, evaluate_given
from cir.train import TRAIN_VERSION, train_cir
from cluster.app.config import RunConfig
from cluster.artifacts import Output, Stage, Work
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.weights import content_identity
from mining.config import ExcludeConfig, GalleryConfig, TripletsConfig, ViewsConfig
from mining.embed import EMBED_VERSION, embed_gallery
from mining.excluded import Excluded, Guard
from mining.features import Features, Online
from mining.gallery import INGEST_VERSION, ingest_captions, ingest_gallery, ingest_triplets
from mining.mine import MINE_VERSION, mine_pairs
from vdg.generate import GENERATE_VERSION, generate
from vdg.images import Images
from vdg.train import ALIGN_VERSION, INSTRUCT_VERSION, align, instruct

KINDS = ("ingest", "embed", "mine", "align", "instruct", "generate", "train", "evaluate")


class Pipeline:
    """Every stage instance of a run. Each property is one kind of stage; a digest follows from the config alone."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.root = config, config.root
        self._made: dict[str, Stage] = {}

    @cached_property
    def stages(self) -> list[Stage]:
        """All instances, parents before children."""
        ordered: dict[str, Stage] = {}

        def visit(stage: Stage) -> None:
            for parent in stage.parents.values():
                visit(parent)
            ordered.setdefault(stage.instance, stage)

        visit(self.evaluation)
        return sorted(ordered.values(), key=lambda stage: KINDS.index(stage.kind))

    def output(self, stage: Stage) -> Output:
        """Where a stage's output lives."""
        return stage.output(self.root)

    def select(self, kind: str | None, only: str | None, until: str | None) -> list[Stage]:
        """The instances asked for, and the ancestors they need. Raises UserError when nothing matches."""
        if until is not None and until not in KINDS:
            raise UserError(f"--until {until}: no such stage; stages are {', '.join(KINDS)}")
        last = KINDS.index(until) if until else len(KINDS)
        chosen = [
            stage
            for stage in self.stages
            if kind in (None, stage.kind) and fnmatch(stage.instance, only or "*") and KINDS.index(stage.kind) <= last
        ]
        if not chosen:
            raise UserError(f"no stage instance matches {only or kind}; `--dry-run` lists them")
        needed = {ancestor.instance for stage in chosen for ancestor in _with_ancestors(stage)}
        return [stage for stage in self.stages if stage.instance in needed]

    def _make(self, stage: Stage) -> Stage:
        return self._made.setdefault(stage.instance, stage)

    # --- ingest and embed ---

    def gallery(self, name: str) -> Stage:
        """`ingest:<gallery>`; the gallery `evaluate` comes from the evaluate section."""
        config, options = self.config, self.config.ingest
        if name == "evaluate" and config.evaluate.is_official:
            return self._benchmark_images
        source = self._gallery_config(name)
        field = "evaluate" if name == "evaluate" else f"ingest.galleries.{name}"
        in_place = None if source.copy_images else Output(source.images).uri  # such a gallery holds paths
        return self._make(
            Stage(
                f"ingest:{name}",
                INGEST_VERSION,
                {"gallery": name, "rows": options.shard_rows, "max_pixels": options.max_pixels, "in_place": in_place},
                lambda output, monitor: ingest_gallery(output, name, source, options, config.resources.ingest, monitor),
                sources=_given({f"{field}.images": source.images, f"{field}.split": source.split}),
                max_reject_fraction=options.max_reject_fraction,
            )
        )

    def _gallery_config(self, name: str) -> GalleryConfig:
        evaluation = self.config.evaluate
        if name == "evaluate":
            assert evaluation.images is not None
            return GalleryConfig(images=evaluation.images, split=evaluation.split)
        return self.config.ingest.galleries[name]

    @property
    def _benchmark_images(self) -> Stage:
        """`ingest:evaluate` of an official benchmark: exactly the images that its split files list, where they are."""
        section, options = self.config.evaluate, self.config.ingest
        annotations, images = section.annotations, section.images
        assert annotations is not None
        assert images is not None
        settings = {"benchmark": section.benchmark, "part": section.part, "in_place": Output(images).uri}
        return self._make(
            Stage(
                "ingest:evaluate",
                INGEST_VERSION,
                {**settings, "rows": options.shard_rows, "max_pixels": options.max_pixels},
                lambda output, monitor: official.ingest_images(
                    output,
                    official.names(section.benchmark, section.part, annotations),
                    images,
                    options,
                    self.config.resources.ingest,
                    monitor,
                ),
                sources={"evaluate.images": images, **self._benchmark_files},
            )
        )

    @property
    def _benchmark_files(self) -> dict[str, str]:
        section = self.config.evaluate
        assert section.annotations is not None
        paths = official.files(section.benchmark, section.part, section.annotations)
        return {f"evaluate.annotations ({path.rpartition('/')[2]})": path for path in paths}

    def _benchmark(self) -> Benchmark:
        """The benchmark of the evaluate section, from its files or from the ingested triplets."""
        section = self.config.evaluate
        if section.annotations is not None:
            return official.load(section.benchmark, section.part, section.annotations, section.remove_reference)
        return triplets.load(
            self.output(self.triplets("queries")), self.output(self.gallery("evaluate")), section.attributes, section
        )

    def triplets(self, name: str) -> Stage:
        """`ingest:<triplets>`; the triplets `queries` come from the evaluate section."""
        if name == "queries" and self.config.evaluate.is_official:
            return self._benchmark_queries
        source = self._queries_config if name == "queries" else self.config.ingest.triplets[name]
        gallery = self.gallery(source.gallery)
        field = "evaluate.triplets" if name == "queries" else f"ingest.triplets.{name}.file"
        return self._make(
            Stage(
                f"ingest:{name}",
                INGEST_VERSION,
                {},
                lambda output, monitor: ingest_triplets(output, self.output(gallery), source.files, monitor),
                {"gallery": gallery},
                _given({field: source.file}),
                self.config.ingest.max_reject_fraction,
            )
        )

    @property
    def _queries_config(self) -> TripletsConfig:
        assert self.config.evaluate.triplets is not None
        return TripletsConfig(gallery="evaluate", file=self.config.evaluate.triplets)

    @property
    def _benchmark_queries(self) -> Stage:
        """`ingest:queries` of an official benchmark."""
        section = self.config.evaluate
        return self._make(
            Stage(
                "ingest:queries",
                official.BENCHMARK_VERSION,
                {"benchmark": section.benchmark, "part": section.part},
                lambda output, monitor: official.ingest_queries(output, self._benchmark(), monitor),
                sources=self._benchmark_files,
            )
        )

    def captions(self, name: str) -> Stage:
        """`ingest:<captions>`."""
        source = self.config.ingest.captions[name]
        gallery = self.gallery(source.gallery)
        return self._make(
            Stage(
                f"ingest:{name}",
                INGEST_VERSION,
                {"until": source.until},
                lambda output, monitor: ingest_captions(output, self.output(gallery), source, monitor),
                {"gallery": gallery},
                {f"ingest.captions.{name}.file": source.file},
                self.config.ingest.max_reject_fraction,
            )
        )

    def embeddings(self, tower: str, gallery: str) -> Stage:
        """`embed:<tower>.<gallery>`; images to search in are embedded plain, training images in every cached view."""
        views = ViewsConfig() if gallery == "evaluate" else self.config.embed.views_of(tower, gallery)
        return self._embeddings(tower, gallery, self.gallery(gallery), views)

    def _embeddings(self, tower: str, name: str, images: Stage, views: ViewsConfig) -> Stage:
        config = self.config
        settings = {
            "tower": content_identity(config.embed.towers[tower]),
            "views": views.model_dump(mode="json", exclude_none=True),  # a field that is off leaves digests as they were
        }
        return self._make(
            Stage(
                f"embed:{tower}.{name}",
                EMBED_VERSION,
                settings,
                lambda output, monitor: embed_gallery(
                    output, self.output(images), tower, config.embed, views, config.resources.embed, monitor
                ),
                {"gallery": images},
                max_reject_fraction=images.max_reject_fraction,
            )
        )

    def _features(self, tower: str, *galleries: str, pixels: bool = False) -> tuple[Features, dict[str, Stage]]:
        """Features of the images of some galleries, and the stages they come from; with `pixels` the images too."""
        config, views = self.config.embed, self.config.embed.views_of(tower, galleries[0])
        names = list(dict.fromkeys(galleries))
        parents = {f"embeddings.{name}": self.embeddings(tower, name) for name in names}
        first, *more = (self.output(stage) for stage in parents.values())
        online = None
        if views.online or pixels:
            outputs = tuple(self.output(self.gallery(name)) for name in names)
            online = Online(outputs, config.towers[tower], views)
        return Features(first, online, tuple(more)), parents

    # --- pairs, the generator, and its deltas ---

    @property
    def pairs(self) -> Stage:
        """`mine:<gallery>`. However many images it excludes, it does not fail: that is what it was asked for."""
        mine, seed = self.config.mine, self.config.seed
        embeddings = self.embeddings(mine.tower, mine.gallery)
        labelled = self.triplets(mine.triplets) if mine.triplets else None
        guard, parents = self._guard()
        return self._make(
            Stage(
                f"mine:{mine.gallery}",
                MINE_VERSION,
                {**mine.model_dump(mode="json", exclude={"exclude"}), "seed": seed},
                lambda output, monitor: mine_pairs(
                    output,
                    self.output(embeddings),
                    self.output(labelled) if labelled else None,
                    guard,
                    mine,
                    seed,
                    self.config.resources.mine,
                    monitor,
                ),
                {"embeddings": embeddings, **({"triplets": labelled} if labelled else {}), **parents},
                max_reject_fraction=1.0,
            )
        )

    def _guard(self) -> tuple[Guard | None, dict[str, Stage]]:
        """What mine keeps out, and the stages it comes from."""
        mine = self.config.mine
        benchmarks: list[Excluded] = []
        parents = {"gallery": self.gallery(mine.gallery)} if mine.exclude else {}
        for name, source in mine.exclude.items():
            images = parents[f"excluded.{name}"] = self._excluded(name, source)
            embeddings = None
            if source.images is not None:
                stage = self._embeddings(mine.tower, f"excluded-{name}", images, ViewsConfig())
                parents[f"excluded.{name}.embeddings"], embeddings = stage, self.output(stage)
            benchmarks.append(Excluded(name, self.output(images), embeddings))
        guard = Guard(self.output(parents["gallery"]), tuple(benchmarks), mine.duplicate_similarity) if mine.exclude else None
        return guard, parents

    def _excluded(self, benchmark: str, source: ExcludeConfig) -> Stage:
        """`ingest:excluded-<benchmark>`: its val and test images, by name, and as a gallery where they are given."""
        from cir.benchmarks import official

        config, name, field = self.config, f"excluded-{benchmark}", f"mine.exclude.{benchmark}"
        options, images = config.ingest, source.images
        settings = {"benchmark": benchmark, "in_place": None if images is None else Output(images).uri}
        files = official.excluded_files(benchmark, source.annotations)
        return self._make(
            Stage(
                f"ingest:{name}",
                INGEST_VERSION,
                {**settings, "rows": options.shard_rows, "max_pixels": options.max_pixels},
                lambda output, monitor: official.ingest_excluded(
                    output, name, benchmark, source.annotations, images, options, config.resources.ingest, monitor
                ),
                sources={f"{field}.annotations ({file.rpartition('/')[2]})": file for file in files}
                | _given({f"{field}.images": images}),
                max_reject_fraction=options.max_reject_fraction,
            )
        )

    @property
    def aligned(self) -> Stage | None:
        """`align:vdg`, where the config has stage 1."""
        config, section = self.config, self.config.align
        if section is None:
            return None
        captions = self.captions(section.captions)
        assert config.vdg.tower is not None
        features, parents = self._features(config.vdg.tower, config.ingest.captions[section.captions].gallery)
        return self._make(
            Stage(
                "align:vdg",
                ALIGN_VERSION,
                self._settings("vdg", "align"),
                lambda output, monitor: align(
                    output, features, self.output(captions), config.vdg, section, config.seed, config.resources.align, monitor
                ),
                {"captions": captions, **parents},
            )
        )

    @property
    def generator(self) -> Stage:
        """`instruct:vdg`."""
        config, section = self.config, self.config.instruct
        triplets, aligned = self.triplets(section.triplets), self.aligned
        images, parents = self._vdg_images(config.ingest.triplets[section.triplets].gallery, section.crop)
        return self._make(
            Stage(
                "instruct:vdg",
                INSTRUCT_VERSION,
                self._settings("vdg", "instruct"),
                lambda output, monitor: instruct(
                    output,
                    images,
                    self.output(triplets),
                    self.output(aligned) if aligned else None,
                    config.vdg,
                    section,
                    config.seed,
                    config.resources.instruct,
                    monitor,
                ),
                {"triplets": triplets, **parents, **({"aligned": aligned} if aligned else {})},
            )
        )

    def _vdg_images(self, gallery: str, crop: bool = True) -> tuple[Features | Images, dict[str, Stage]]:
        """What the generator sees of a gallery's images, and the stage it comes from."""
        if self.config.vdg.tower is not None:
            return self._features(self.config.vdg.tower, gallery)
        stage = self.gallery(gallery)
        return Images((self.output(stage),), crop), {"gallery": stage}

    def _settings(self, *sections: str) -> dict[str, Any]:
        dumped = {name: content_identity(getattr(self.config, name)) for name in sections}
        return {**dumped, "seed": self.config.seed, "online": self.config.embed.any_online}

    @property
    def pseudo_triplets(self) -> Stage:
        """`generate:<gallery>`."""
        config = self.config
        pairs, model = self.pairs, self.generator
        images, parents = self._vdg_images(config.mine.gallery)
        return self._make(
            Stage(
                f"generate:{config.mine.gallery}",
                GENERATE_VERSION,
                {**config.generate.model_dump(mode="json", exclude={"max_reject_fraction"}), "seed": config.seed},
                lambda output, monitor: generate(
                    output,
                    images,
                    self.output(pairs),
                    self.output(model),
                    config.generate,
                    config.seed,
                    config.resources.generate,
                    monitor,
                ),
                {"pairs": pairs, "vdg": model, **parents},
                max_reject_fraction=config.generate.max_reject_fraction,
            )
        )

    # --- retrieval ---

    def model(self, name: str, seed: int) -> Stage:
        """`train:<variant>.s<seed>`."""
        config, variant = self.config, self.config.train.variant(name)
        triplets = self.triplets(variant.triplets)
        pseudo = self.pseudo_triplets if variant.pseudo else None
        galleries = [config.ingest.triplets[variant.triplets].gallery, *([config.mine.gallery] if pseudo else [])]
        features, parents = self._features(config.train.tower, *galleries, pixels=variant.model == "blip")
        return self._make(
            Stage(
                f"train:{name}.s{seed}",
                TRAIN_VERSION,
                {**content_identity(variant), "seed": seed, "online": config.embed.any_online},
                lambda output, monitor: train_cir(
                    output,
                    features,
                    self.output(triplets),
                    self.output(pseudo) if pseudo else None,
                    variant,
                    seed,
                    config.resources.train,
                    monitor,
                ),
                {"triplets": triplets, **parents, **({"pseudo_triplets": pseudo} if pseudo else {})},
            )
        )

    @property
    def models(self) -> dict[str, Stage]:
        """Every variant with every seed, as `<variant>.s<seed>`."""
        train = self.config.train
        return {f"{name}.s{seed}": self.model(name, seed) for name in train.variants for seed in train.seeds}

    @property
    def evaluation(self) -> Stage:
        """`evaluate:all`; of given embeddings without a model."""
        section, queries = self.config.evaluate, self.triplets("queries")
        if section.embeddings is not None:
            return self._evaluation(self._evaluate_given, {"queries": queries})
        gallery, embeddings = self.gallery("evaluate"), self.embeddings(self.config.train.tower, "evaluate")
        parents = {"queries": queries, "gallery": gallery, "embeddings": embeddings, **self.models}
        return self._evaluation(self._evaluate_models, parents)

    def _evaluation(self, work: Work, parents: dict[str, Stage]) -> Stage:
        section, text = self.config.evaluate, self._shared_text
        paths = {"images", "split", "triplets", "attributes", "annotations", "embeddings"}
        settings = section.model_dump(mode="json", exclude=paths) | {"text": content_identity(text) if text else None}
        sources = _given({"evaluate.attributes": section.attributes, "evaluate.embeddings": section.embeddings})
        return self._make(Stage("evaluate:all", EVALUATE_VERSION, settings, work, parents, sources))

    def _evaluate_models(self, output: Output, monitor: Monitor) -> None:
        config = self.config
        evaluate(
            output,
            self._benchmark(),
            self.output(self.embeddings(config.train.tower, "evaluate")),
            self.output(self.gallery("evaluate")),
            {name: self.output(model) for name, model in self.models.items()},
            self._shared_text,
            config.evaluate,
            config.resources.evaluate,
            monitor,
        )

    def _evaluate_given(self, output: Output, monitor: Monitor) -> None:
        section = self.config.evaluate
        assert section.embeddings is not None
        evaluate_given(output, self._benchmark(), section.embeddings, section, self.config.resources.evaluate, monitor)

    @property
    def _shared_text(self) -> TextTower | None:
        """The text encoder, where it and the image tower are the two sides of one model of open_clip."""
        tower, text = self.config.embed.towers[self.config.train.tower], self.config.train.text
        if text is None or (tower.library, text.library) != ("open_clip", "open_clip") or tower.weights != text.weights:
            return None
        weights = text.weights  # a hub's name says the architecture too
        return text if weights and (weights.hub or tower.model == text.model) else None


def _given(sources: Mapping[str, str | list[str] | None]) -> dict[str, str]:
    """Path of each file of the fields that are set; a field that lists several has one entry for each."""
    single = {field: path for field, path in sources.items() if isinstance(path, str)}
    several = {field: paths for field, paths in sources.items() if isinstance(paths, list)}
    return single | {f"{field}[{i}]": path for field, paths in several.items() for i, path in enumerate(paths)}


def _with_ancestors(stage: Stage) -> Iterator[Stage]:
    yield stage
    for parent in stage.parents.values():
        yield from _with_ancestors(parent)
