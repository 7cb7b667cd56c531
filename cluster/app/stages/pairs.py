"""The stage that mines pairs, and what it must keep out."""

from cir.benchmarks import official
from cluster.app.stages.sources import Sources, given
from cluster.artifacts import Output, Stage
from mining.config import ExcludeConfig, ViewsConfig
from mining.excluded import Excluded, Guard
from mining.gallery import INGEST_VERSION
from mining.mine import MINE_VERSION, mine_pairs


class Pairs(Sources):
    """Pairs of the auxiliary gallery's images."""

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
                stage = self.embed(mine.tower, f"excluded-{name}", images, ViewsConfig())
                parents[f"excluded.{name}.embeddings"], embeddings = stage, self.output(stage)
            benchmarks.append(Excluded(name, self.output(images), embeddings))
        guard = Guard(self.output(parents["gallery"]), tuple(benchmarks), mine.duplicate_similarity) if mine.exclude else None
        return guard, parents

    def _excluded(self, benchmark: str, source: ExcludeConfig) -> Stage:
        """`ingest:excluded-<benchmark>`: its val and test images, by name, and as a gallery where they are given."""
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
                | given({f"{field}.images": images}),
                max_reject_fraction=options.max_reject_fraction,
            )
        )
