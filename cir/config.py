"""Config of the composed-retrieval stages: train, score, select and evaluate."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import FOLDER, NOT_CONTENT, PARTIAL, Section, Seed, Seeds, TrainingConfig, validate
from mining.config import BenchmarkName, TextTower

_Rank = Annotated[int, Field(ge=1)]
ScorerName = Literal["log_probability", "agreement", "round_trip"]


class PseudoSelection(Section):
    """Which pseudo triplets are used: first by score, then an amount of what is left, drawn in whole groups.

    The paper filters nothing. A score is any of `select.SCORERS`; where several are named, each triplet's score is the
    mean over them of the share of triplets that it beats, so that scorers of different units count alike.
    """

    drop_repeated: bool = Field(True, description="leave out deltas that repeat themselves; the paper keeps all")
    scorers: tuple[ScorerName, ...] = Field(("log_probability",), min_length=1, description="what the score is made of")
    min_score: float | None = Field(None, description="least score, in the unit of the one scorer; a share for several")
    top_fraction: float | None = Field(None, gt=0, le=1, description="share to keep, the highest scores first")
    weight_power: float | None = Field(
        None, gt=0, description="draw a triplet with probability ~ (share of triplets that it beats) ** weight_power"
    )
    groups: int | None = Field(None, gt=0, description="number of whole groups (paper: 3345 for CIRR)")
    ratio: float | None = Field(None, gt=0, description="pseudo images / labelled images (paper: best at 1)")
    seed: Seed = Field(0, description="of the drawn groups, and of the permutation of `shuffle_deltas`")

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.groups is not None and self.ratio is not None:
            raise ValueError("give 'groups' or 'ratio', not both")
        return self

    @property
    def by_score(self) -> bool:
        """Whether scores are needed."""
        return any(value is not None for value in (self.min_score, self.top_fraction, self.weight_power))

    @property
    def by_round_trip(self) -> bool:
        """Whether a retrieval model has to score the pseudo triplets."""
        return self.by_score and "round_trip" in self.scorers


class Validation(Section):
    """Labelled triplets held out of training: those of fold `fold`, by a stable hash of their id."""

    folds: int = Field(0, ge=0, description="0 holds nothing out")
    fold: int = Field(0, ge=0, description="the one that is held out, counted from 0")

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise ValueError(f"fold {self.fold} of {self.folds}: set folds to 0 or at least 2, and fold below folds")
        return self


class LossConfig(Section):
    """What is minimised (PAPER 3.3). The paper's: info_nce for the Combiner, hn_nce and tdm for BLIP."""

    contrastive: Literal["info_nce", "hn_nce"] = Field("info_nce", description="L_c, of composed queries and targets")
    alpha: float = Field(1.0, gt=0, description="hn_nce: weight of the positive in the denominator")
    beta: float = Field(0.5, ge=0, description="hn_nce: how much harder negatives count more; 0: all alike")
    concat: bool = Field(
        True, description="the pseudo term is over labelled and pseudo triplets together, or over the pseudo ones alone"
    )
    tdm: bool = Field(False, description="blip: add target-delta matching")
    alike: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="cosine of two targets above which neither is the other's negative: they may show the same thing; "
        "None: only the same image is none, as in the paper",
    )
    reference_negative: bool = Field(False, description="each query's own reference image is one of its negatives")
    unlabelled: int = Field(
        0,
        ge=0,
        description="fusion: images of the mined gallery, drawn once, that are negatives of every query; the paper: none",
    )


class VariantConfig(Section):
    """What one trained model is, but for its seed."""

    model: Literal["fusion", "blip"] = Field(
        "fusion",
        description="of image and text features, or BLIP's image-grounded text encoder with train.tower's weights",
    )

    triplets: str = Field("train", description="name of the labelled triplets")
    pseudo: bool = Field(False, description="semi-supervised: add pseudo triplets to each batch (PAPER 3.3, Eq. 2)")
    pseudo_only: bool = Field(False, description="train on the pseudo triplets alone (setting e)")
    selection: PseudoSelection = PseudoSelection()
    round: int | None = Field(None, ge=1, description="use the pseudo triplets of this round; None: of the last one")
    own_deltas: bool = Field(False, description="the generator's delta of each labelled pair joins its captions (PAPER 2.3)")
    human_deltas: bool = Field(True, description="false: of the labelled triplets `own_deltas` alone are trained on")
    shuffle_deltas: bool = Field(False, description="control: permute the deltas of the pseudo triplets")
    zero: Literal["image", "text"] | None = Field(None, description="control: this input is zero in training and evaluation")
    text: TextTower | None = Field(None, description="fusion: the encoder of deltas")
    fusion: Literal["combiner", "residual"] = Field("combiner", description="the paper's, or one for unequal widths")
    hidden: int | None = Field(None, gt=0, description="None: twice the width (combiner), 1024 (residual)")
    image_hidden: int | None = Field(None, ge=0, description="residual: hidden units that see the reference; None: `hidden`")
    dropout: float | None = Field(None, ge=0, lt=1, description="None: 0.0 (combiner), 0.3 (residual)")
    center: bool = Field(False, description="subtract the labelled images' mean from image features and normalise them")
    augment_target: bool = Field(True, description="targets are drawn views as references are, or always the plain image")
    temperature: Literal["fixed", "learned"] | None = Field(
        None, description="0.01, or learned from e^-2.9 (fusion) or 0.07 (blip); None: fixed (fusion), learned (blip)"
    )
    loss: LossConfig = LossConfig()
    training: TrainingConfig
    validation: Validation = Validation()

    @model_validator(mode="after")
    def _pseudo_is_used(self) -> Self:
        for name in ("pseudo_only", "shuffle_deltas", "round"):
            if getattr(self, name) and not self.pseudo:
                raise ValueError(f"'{name}' needs 'pseudo: true'")
        if not self.human_deltas and not self.own_deltas:
            raise ValueError("'human_deltas: false' leaves the labelled triplets no text: it needs 'own_deltas: true'")
        if self.pseudo_only and self.selection.weight_power is not None:
            raise ValueError("'pseudo_only' visits every pseudo triplet once an epoch: set selection.weight_power to null")
        return self

    @model_validator(mode="after")
    def _fields_are_the_models(self) -> Self:
        if self.model == "fusion":
            if self.text is None:
                raise ValueError("model 'fusion' needs 'text': the encoder of deltas")
            if self.loss.tdm:
                raise ValueError("'loss.tdm' needs 'model: blip': an image-grounded text encoder")
            return self
        for name in ("text", "hidden", "image_hidden", "dropout", "zero"):
            if getattr(self, name) is not None:
                raise ValueError(f"'{name}' is of model 'fusion'; model 'blip' takes all from the weights of train.tower")
        if self.loss.unlabelled:
            raise ValueError("'loss.unlabelled' is of model 'fusion': it takes cached features")
        if self.center:
            raise ValueError("'center' is of model 'fusion': BLIP compares its features as they are")
        return self

    @property
    def is_control(self) -> bool:
        """Whether it shows what a recipe gives without its texts or images."""
        return self.shuffle_deltas or self.zero is not None

    @property
    def uses_generator(self) -> bool:
        """Whether it is trained on what a generator wrote."""
        return self.pseudo or self.own_deltas

    @property
    def learns_temperature(self) -> bool:
        """Whether tau is a parameter."""
        return self.temperature == "learned" or (self.temperature is None and self.model == "blip")


class TrainConfig(VariantConfig):
    """A base recipe and the variants of it that are trained, each with every seed."""

    variants: dict[str, dict[str, Any]] = Field(
        min_length=1,
        json_schema_extra={**PARTIAL, "additionalProperties": {"anyOf": [{"type": "object"}, {"type": "null"}]}},
        description="name -> fields that differ from the base recipe; null switches off one of a config that is extended",
    )
    seeds: Seeds = Field([0], description="each variant is trained once with each")

    @field_validator("variants", mode="before")
    @classmethod
    def _without_nulls(cls, variants: Any) -> Any:
        """`null` switches off a variant of the preset that a config extends."""
        return {n: v for n, v in variants.items() if v is not None} if isinstance(variants, dict) else variants

    @model_validator(mode="after")
    def _variants_are_valid(self) -> Self:
        for name in self.variants:
            if not re.fullmatch(FOLDER, name):
                raise ValueError(f"variant {name!r}: use up to 64 letters, digits, '_' and '-'")
            self.variant(name)
        return self

    def variant(self, name: str) -> VariantConfig:
        """The base recipe with a variant's fields put over it. Raises UserError naming the variant's wrong fields."""
        base = self.model_dump(include=set(VariantConfig.model_fields))
        return validate(VariantConfig, merge(base, self.variants[name]), f"train.variants.{name}")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, section by section."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


class ScoreConfig(Section):
    """The round-trip score: how high a retrieval model ranks the target for (reference, delta). Beyond the paper."""

    judge: str = Field("supervised", description="variant whose first seed ranks; it must not use the pseudo triplets itself")
    gallery_images: int = Field(20_000, gt=0, description="images of a seeded sample that the target is ranked among")
    batch_size: int = Field(256, gt=0, description="queries a forward pass")


class RoundsConfig(Section):
    """Further rounds of the generator, which learns from its own confident deltas too. Beyond the paper."""

    count: int = Field(1, ge=1, le=20, description="1: the paper's single pass")
    judge: str = Field("semi", description="variant whose first seed, trained on a round's deltas, scores them for the next")
    selection: PseudoSelection = Field(
        PseudoSelection(scorers=("log_probability", "round_trip"), top_fraction=0.5),
        description="deltas of a round that the next round's generator learns from",
    )


Part = Literal["val", "test"]
Split = Literal["train", "val", "test"]


class RerankConfig(Section):
    """The generator orders the best images of each query again, by the cosine + weight * log p(text | reference, image)."""

    top: int = Field(20, ge=2, le=50, description="images of each query's ranking that are ordered again")
    weight: float = Field(
        0.005, gt=0, description="of the log-likelihood (nats), against the cosine; the default is of 5-fold cross-validation"
    )


class EvaluateConfig(Section):
    """How trained models are scored."""

    benchmark: Literal["triplets", BenchmarkName] = Field(
        "triplets", description="an official protocol, or 'triplets': a file of one's own"
    )
    part: Part = Field("val", description="test: its labels are hidden, and submission files are all that is written")
    remove_reference: bool | None = Field(
        None, description="fashioniq: take the query's reference out of its ranking; None: the usual protocol, which keeps it"
    )
    own_deltas: bool = Field(
        False, description="the queries' texts are the generator's deltas of their pairs, which has seen the targets"
    )
    recalls: list[_Rank] = Field([1, 5, 10], min_length=1, description="K of Recall@K of 'triplets'")
    subset_recalls: list[_Rank] = Field(
        [1, 2, 3], description="K of the recall among the other members of a query's group, where the triplets list them"
    )
    batch_size: int = Field(256, gt=0, description="queries a forward pass")
    baseline: str = Field("supervised", description="variant that the others' gains are measured against")
    oracle: str = Field("oracle", description="variant that knows more labels: of its gain the others' share is given")
    resamples: int = Field(10_000, gt=0, description="of the paired bootstrap")
    folds: int = Field(
        0,
        ge=0,
        le=20,
        description="recommend a model by cross-validation on the labelled triplets, each fold with a generator that has not "
        "seen it, in so many more trainings; 0: by the evaluation itself",
    )

    rerank: RerankConfig | None = Field(
        None,
        json_schema_extra=NOT_CONTENT,
        description="further rows `<variant>+rerank`: the best images, ordered again by the generator's likelihood of the text",
    )

    @model_validator(mode="after")
    def _folds_are_several(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds: 1 fold leaves nothing to train on; set it to 0 or at least 2")
        return self

    @model_validator(mode="after")
    def _protocol_is_open(self) -> Self:
        if self.part == "test" and self.benchmark not in ("cirr", "circo"):
            raise ValueError(f"part 'test': {self.benchmark} has no server that scores hidden labels; set it to val")
        if self.own_deltas and self.part == "test":
            raise ValueError("'own_deltas' are written of (reference, target), and test's targets are hidden; set part to val")
        if self.rerank and self.part == "test":
            raise ValueError("'rerank' reports figures, and test's labels are hidden; set part to val, or rerank to null")
        if self.rerank and self.own_deltas:
            raise ValueError("'rerank' reads texts of which the generator has not seen the target; set own_deltas to false")
        if self.remove_reference is not None and self.benchmark != "fashioniq":
            raise ValueError("'remove_reference' is for fashioniq alone: the other protocols say what happens to it")
        return self

    @property
    def is_official(self) -> bool:
        """Whether the queries come from a benchmark's own files."""
        return self.benchmark != "triplets"

    @property
    def headline(self) -> str:
        """The metric that gains are measured in; FashionIQ's R@10 is the mean over its categories."""
        fixed = {"cirr": "R@1", "fashioniq": "R@10", "circo": "mAP@5"}
        return fixed.get(self.benchmark, f"R@{self.recalls[0]}")
