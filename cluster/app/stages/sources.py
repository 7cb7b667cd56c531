"""What enters a run from outside, and what the image towers make of it."""

from collections.abc import Mapping

from cir.benchmarks import official, triplets
from cir.benchmarks.benchmark import Benchmark
from cluster.app.config import RunConfig
from cluster.artifacts import Output, Stage, output_of
from cluster.earlier import earlier_output
from cluster.errors import UserError
from cluster.weights import content_identity
from mining.config import GalleryConfig, TripletsConfig, ViewsConfig
from mining.embed import EMBED_VERSION, embed_gallery
from mining.features import Features, Online
from mining.gallery import INGEST_VERSION, ingest_captions, ingest_gallery, ingest_triplets
from mining.reuse import Earlier, open_earlier


class Sources:
    """Galleries, triplets, captions and a benchmark's own files; embeddings of the images."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.root = config, config.root
        self._made: dict[str, Stage] = {}

    def output(self, stage: Stage) -> Output:
        """Where a stage's output lives."""
        return stage.output(self.root)

    def _make(self, stage: Stage) -> Stage:
        return self._made.setdefault(stage.instance, stage)

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
                sources=given({f"{field}.images": source.images, f"{field}.split": source.split}),
                max_reject_fraction=options.max_reject_fraction,
            )
        )

    def _gallery_config(self, name: str) -> GalleryConfig:
        evaluation = self.config.evaluate
        if name == "evaluate":
            assert evaluation.images is not None
            return GalleryConfig(images=evaluation.images, split=evaluation.split)
        return self.config.ingest.galleries[name]

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
                given({field: source.file}),
                self.config.ingest.max_reject_fraction,
            )
        )

    @property
    def _queries_config(self) -> TripletsConfig:
        assert self.config.evaluate.triplets is not None
        return TripletsConfig(gallery="evaluate", file=self.config.evaluate.triplets)

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
        return self.embed(tower, gallery, self.gallery(gallery), views)

    def embed(self, tower: str, name: str, images: Stage, views: ViewsConfig) -> Stage:
        """`embed:<tower>.<name>` of these images and views."""
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
                    output,
                    self.output(images),
                    tower,
                    config.embed,
                    views,
                    config.resources.embed,
                    monitor,
                    self._earlier(f"embed:{tower}.{name}", images),
                ),
                {"gallery": images},
                max_reject_fraction=images.max_reject_fraction,
            )
        )

    def _earlier(self, instance: str, images: Stage) -> Earlier | None:
        """Embeddings of an earlier state of a gallery, where both are still there."""
        found = earlier_output(self._made[instance], self.root)
        if found is None:
            return None
        embeddings, manifest = found
        gallery = output_of(self.root, images.instance, manifest["parents"]["gallery"]["digest"])
        return open_earlier(embeddings, gallery) if gallery.manifest() is not None else None

    def features(self, tower: str, *galleries: str, pixels: bool = False) -> tuple[Features, dict[str, Stage]]:
        """Features of the images of some galleries, and the stages they come from; with `pixels` the images too.

        Raises UserError when a gallery lacks cached views that the first one has, and so are drawn for all.
        """
        config, views = self.config.embed, self.config.embed.views_of(tower, galleries[0])
        names = list(dict.fromkeys(galleries))
        parents = {f"embeddings.{name}": self.embeddings(tower, name) for name in names}
        first, *more = (self.output(stage) for stage in parents.values())
        online = None
        if views.online or pixels:
            outputs = tuple(self.output(self.gallery(name)) for name in names)
            online = Online(outputs, config.towers[tower], views)
        else:
            self._check_views(tower, names)
        return Features(first, online, tuple(more)), parents

    def _check_views(self, tower: str, galleries: list[str]) -> None:
        first, *others = (self.config.embed.views_of(tower, name).count for name in galleries)
        for name, count in zip(galleries[1:], others, strict=True):
            if count < first:
                raise UserError(
                    f"embed.views_for: '{tower}.{galleries[0]}' and '{tower}.{name}', which a stage reads together, have "
                    f"{first} and {count} cached views; give '{tower}.{name}' as many"
                )

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

    def benchmark(self) -> Benchmark:
        """The benchmark of the evaluate section, from its files or from the ingested triplets."""
        section = self.config.evaluate
        if section.annotations is not None:
            return official.load(section.benchmark, section.part, section.annotations, section.remove_reference)
        return triplets.load(
            self.output(self.triplets("queries")), self.output(self.gallery("evaluate")), section.attributes, section
        )

    @property
    def _benchmark_queries(self) -> Stage:
        """`ingest:queries` of an official benchmark."""
        section = self.config.evaluate
        return self._make(
            Stage(
                "ingest:queries",
                official.BENCHMARK_VERSION,
                {"benchmark": section.benchmark, "part": section.part},
                lambda output, monitor: official.ingest_queries(output, self.benchmark(), monitor),
                sources=self._benchmark_files,
            )
        )


def given(sources: Mapping[str, str | list[str] | None]) -> dict[str, str]:
    """Path of each file of the fields that are set; a field that lists several has one entry for each."""
    single = {field: path for field, path in sources.items() if isinstance(path, str)}
    several = {field: paths for field, paths in sources.items() if isinstance(paths, list)}
    return single | {f"{field}[{i}]": path for field, paths in several.items() for i, path in enumerate(paths)}
