"""Config of the stages align, instruct and generate."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.config import NOT_CONTENT, Section, TrainingConfig
from cluster.weights import Pretrained, Weights
from mining.config import TextTower


class VdgConfig(Pretrained):
    """The Visual Delta Generator's architecture (paper, section 3.1 and supplement)."""

    backbone: Literal["features", "image_text", "chooser"] = Field(
        "features",
        description="a projection of an image tower's tokens into a language model, a model that sees pixels, or one that "
        "chooses among the labelled deltas",
    )
    language_model: Weights | None = Field(
        None,
        description="features: any causal language model of transformers (`file` may name a GGUF); "
        "image_text: any of its image-text-to-text models that has a processor and a chat template",
    )
    lora_rank: int = Field(64, gt=0, description="rank of the low-rank update of each target layer")
    lora_alpha: int = Field(16, gt=0, description="LoRA is scaled by alpha / rank")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout before LoRA, in training")
    lora_targets: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1, description="the model's query and value layers")
    prompt: Literal["paper", "short"] = Field("paper", description="the paper's two-image prompt, or one of ten words")
    projection: Literal["linear", "mlp"] = Field("linear", description="features: one linear layer, or two as LLaVA's")
    tokens_per_feature: int = Field(1, gt=0, description="features: language-model embeddings made of an image-tower token")
    center: bool = Field(False, description="features: subtract the labelled images' mean, then scale to norm sqrt(dim)")
    feature_dropout: float = Field(0.0, ge=0, lt=1, description="features: dropout on them, in training")
    text: TextTower | None = Field(None, description="chooser: the encoder of the deltas, kept frozen")
    hidden: int = Field(256, gt=0, description="chooser: hidden units that see the reference, the target, and what differs")

    @model_validator(mode="after")
    def _knows_words(self) -> Self:
        needed, other = ("text", "language_model") if self.backbone == "chooser" else ("language_model", "text")
        if getattr(self, needed) is None:
            raise ValueError(f"{needed}: backbone '{self.backbone}' needs it")
        if getattr(self, other) is not None:
            raise ValueError(f"{other}: backbone '{self.backbone}' has none; set it to null")
        if self.text is not None and self.text.trained:
            raise ValueError("text.trained: backbone 'chooser' keeps its text encoder frozen; set it to false")
        return self

    @property
    def language(self) -> Weights:
        """The language model's weights, of a backbone that has one."""
        assert self.language_model is not None
        return self.language_model

    @property
    def source(self) -> tuple[str, Weights | None]:
        """`language_model`, or what the encoder of the deltas has."""
        if self.text is None:
            return "language_model", self.language
        name, weights = self.text.source
        return f"text.{name}", weights

    def check_library(self) -> None:
        """As the library that loads it says."""
        if self.text is not None:
            self.text.check_library()
            return
        from vdg.language import check_language_model

        check_language_model(self.language, sees_images=self.backbone == "image_text")


class AlignConfig(Section):
    """Stage 1: the projection alone learns to caption single images (paper, Eq. 1 and Algorithm 1)."""

    training: TrainingConfig
    max_tokens: int = Field(32, gt=1, description="longer captions are cut; end of text included")


class InstructConfig(Section):
    """Stage 2: projection and LoRA learn to write the delta of a triplet (paper, Algorithm 2)."""

    training: TrainingConfig
    max_tokens: int = Field(32, gt=1, description="longer deltas are cut; end of text included")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the triplets kept for the validation loss; 0: the last step is kept"
    )
    crop: bool = Field(True, description="image_text: train on random crops (features: see embed.views)")


class GenerateConfig(Section):
    """How deltas are decoded (paper, supplement: sampled at temperature 0.2 from the 50 likeliest tokens)."""

    batch_size: int = Field(64, gt=0, description="pairs decoded together")
    greedy: bool = Field(False, description="take the likeliest token; temperature and top_k are not used")
    temperature: float = Field(0.2, gt=0, description="of the sampling")
    top_k: int = Field(50, gt=0, description="likeliest tokens that are sampled from")
    precision: Literal["fp32", "bf16", "auto"] = Field("auto", description="auto: bf16 where the processor is fast at it")
    max_new_tokens: int = Field(32, gt=0, description="end of text included; a text cut off here loses its last token")
    samples: int = Field(1, gt=0, description="above 1: sample so many deltas a pair and keep the one that agrees best")
    views: bool = Field(False, description="sample i sees view i of both images: agreement then measures robustness to crops")
    drop_no_change: bool = Field(False, description="reject pairs whose delta says that nothing changes")
    max_reject_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        json_schema_extra=NOT_CONTENT,
        description="share of pairs with an empty or no-change delta above which the stage fails",
    )

    @model_validator(mode="after")
    def _views_need_samples(self) -> Self:
        if self.views and self.samples == 1:
            raise ValueError("views: a single delta sees the plain images; set samples above 1")
        return self
