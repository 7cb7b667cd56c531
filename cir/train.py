"""The stage train: one variant with one seed."""

from dataclasses import dataclass, field
from typing import NamedTuple

from cir.config import VariantConfig
from cir.select import Pseudo, pseudo_of, repeated
from cir.tasks import TASKS
from cir.tasks.triplets import Gallery
from cluster.artifacts import Output
from cluster.config import WorkerResources
from cluster.errors import UserError
from cluster.stage import LOOKED_UP, RunContext, Stage
from cluster.training.loop import train, unfit
from mining import tables
from mining.embeddings import INFO
from mining.features import copy_mean, features_of

MODEL = "cir.json"
RESULT = "result.json"
FIRST = -1  # the generator of a model whose name names none


class ModelName(NamedTuple):
    """A trained model, as `<variant>[.g<generator>].s<seed>`. They sort by variant, generator and seed."""

    variant: str
    generator: int
    seed: int

    @classmethod
    def parse(cls, name: str) -> "ModelName":
        """Of a name."""
        variant, *generator, seed = name.split(".")
        return cls(variant, int(generator[0][1:]) if generator else FIRST, int(seed[1:]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Train(Stage):
    """`train:<variant>[.g<generator>].s<seed>`: a composed-retrieval model.

    Written are its config, the centring mean, the best weights and their metrics.
    """

    version = 6
    model = "composed retrieval"
    triplets: Stage
    embeddings: tuple[Stage, ...] = field(metadata=LOOKED_UP)  # of the triplets' images
    galleries: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of those images, where pixels are seen in training
    center: Stage
    gallery: Stage | None = None  # embeddings of the mined gallery, where its images are negatives
    mineable: Stage | None = None  # of that gallery, where some are excluded
    pseudo_triplets: Stage | None = None
    scores: Stage | None = None
    config: VariantConfig
    seed: int
    resources: WorkerResources

    @property
    def variant(self) -> str:
        """The first part of the name."""
        return self.name.partition(".")[0]

    def config_field(self, name: str) -> str:
        """The variant's section."""
        return f"train.variants.{self.variant}" if name == "config" else name

    def check(self) -> dict[str, str]:
        """A batch has to divide over the workers, and to hold triplets that are each other's negatives."""
        field, training = f"train.variants.{self.variant}.training", self.config.training
        return super().check() | (unfit(field, training, self.resources) or self._uncontrasted(field))

    def _uncontrasted(self, field: str) -> dict[str, str]:
        config, workers = self.config, max(self.resources.workers, 1)
        micro, _ = config.training.accumulation(workers)
        paired = config.pseudo and not config.pseudo_only  # each labelled triplet brings a pseudo one
        if micro * workers > 1 or paired or config.loss.reference_negative:
            return {}
        return {field: "a forward pass holds one triplet, which has no negatives: take a batch_size and micro_batch above 1"}

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError before anything is loaded when the inputs do not fit the variant."""
        config, triplets = self.config, run.output(self.triplets)
        features = features_of(run, self.embeddings, self.galleries, self.center)
        pseudo = pseudo_of(run, self.pseudo_triplets, self.scores) if self.pseudo_triplets and config.pseudo else None
        info = features.embeddings.read_json(INFO)
        _check_inputs(triplets, pseudo, config, info["tokens"])
        if config.text is not None and config.fusion == "combiner":
            from cir.models.composed import check_widths
            from mining.texts import text_width

            check_widths(info["dim"], text_width(config.text))
        mineable = run.output(self.mineable) if self.mineable else None
        gallery = Gallery(run.output(self.gallery), mineable) if self.gallery else None
        # read on the driver, so that a mistake costs no worker
        labelled, pseudo_triplets = TASKS[config.model](features, triplets, pseudo, config, gallery).check()
        left_out = 0
        if pseudo is not None and config.selection.drop_repeated:
            left_out = int(repeated(pseudo.triplets.read_parts(tables.TRIPLETS, ["deltas"])).sum())
        content = {
            "version": self.version,
            "seed": self.seed,
            "dim": info["dim"],
            "labelled_triplets": labelled,
            "pseudo_triplets": pseudo_triplets,
            "repeated": left_out,
            "config": config.model_dump(mode="json"),
        }
        if TASKS[config.model].sees_pixels and features.online is not None:
            content["tower"] = features.online.tower.model_dump(mode="json")
        output.write_json(MODEL, content)
        copy_mean(features, output)
        # a fresh task: the checks filled the other's caches, which would travel
        task = TASKS[config.model](features, triplets, pseudo, config, gallery)
        output.write_json(RESULT, train(output, task, config.training, self.seed, self.resources, run.monitor, run.groups))


def _check_inputs(triplets: Output, pseudo: Pseudo | None, config: VariantConfig, tokens: int) -> None:
    if tokens != 1:
        raise UserError(
            f"train: needs one feature vector an image, the embeddings have {tokens}; use a tower with output: pooled"
        )
    if not sum(triplets.part_rows().values()):
        raise UserError(f"train.triplets: '{config.triplets}' ({triplets.uri}) has no triplets")
    if config.pseudo and pseudo is None:
        raise UserError(
            "train.pseudo: the variant uses pseudo triplets, but none were generated; add generate, or set pseudo: false"
        )
