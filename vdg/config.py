"""Config of the stages align, instruct and generate, and the description that is kept beside a trained generator."""

from typing import Literal

from pydantic import Field, ValidationError

from cluster.artifacts import Output
from cluster.config import Section
from cluster.errors import UserError
from cluster.training import TrainingConfig
from cluster.weights import Weights

DESCRIPTION = "vdg.json"
Stage = Literal["align", "instruct"]


class VdgConfig(Section):
    """The Visual Delta Generator's architecture (paper, section 3.1 and supplement)."""

    language_model: Weights = Field(description="any causal language model of transformers; `file` may name a GGUF")
    lora_rank: int = Field(64, gt=0)
    lora_alpha: int = Field(16, gt=0, description="LoRA is scaled by alpha / rank")
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    lora_targets: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1, description="the model's query and value layers")
    tokens_per_feature: int = Field(1, gt=0, description="language-model embeddings made of each image-tower token")
    prompt: Literal["paper", "short"] = Field("paper", description="the paper's two-image prompt, or one of ten words")
    center: bool = Field(False, description="subtract the training gallery's mean, then scale to norm sqrt(dim)")
    feature_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the features, in training")


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


class GenerateConfig(Section):
    """How deltas are decoded (paper, supplement: sampled at temperature 0.2 from the 50 likeliest tokens)."""

    batch_size: int = Field(64, gt=0, description="pairs decoded together")
    greedy: bool = Field(False, description="take the likeliest token; temperature and top_k are not used")
    temperature: float = Field(0.2, gt=0)
    top_k: int = Field(50, gt=0)
    precision: Literal["fp32", "bf16", "auto"] = Field("auto", description="auto: bf16 where the processor is fast at it")
    max_new_tokens: int = Field(32, gt=0, description="end of text included; a text cut off here loses its last token")


class Description(Section):
    """What `vdg.json` says of a trained generator: all that is needed to build it again."""

    stage: Stage
    tokens: int = Field(gt=0, description="image-tower tokens an image")
    dim: int = Field(gt=0, description="width of an image-tower token")
    vdg: VdgConfig


def read_description(model: Output) -> Description:
    """The description of a trained generator. Raises UserError when the output holds none or a broken one."""
    try:
        return Description.model_validate(model.read_json(DESCRIPTION))
    except FileNotFoundError as error:
        raise UserError(f"{model.uri}: has no {DESCRIPTION}; give the output of align or instruct") from error
    except ValidationError as error:
        raise UserError(f"{model.path(DESCRIPTION)}: {error}; train the generator again") from error
