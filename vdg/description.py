"""What is kept beside a trained generator: all that is needed to build it again."""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, ValidationError

from cluster.artifacts import Output
from cluster.config import Section
from cluster.errors import UserError
from mining.embeddings import INFO
from mining.features import Features, copy_mean
from vdg.config import VdgConfig
from vdg.images import ImageSource

DESCRIPTION = "vdg.json"


class Description(Section):
    """What `vdg.json` says."""

    stage: Literal["align", "instruct"]
    vdg: VdgConfig
    tokens: int | None = Field(None, gt=0, description="features: image-tower tokens an image")
    dim: int | None = Field(None, gt=0, description="features: width of an image-tower token")
    texts: tuple[str, ...] = Field((), description="chooser: the deltas that it chooses among")


def read_description(model: Output) -> Description:
    """The description of a trained generator. Raises UserError when the output holds none or a broken one."""
    try:
        return Description.model_validate(model.read_json(DESCRIPTION))
    except FileNotFoundError as error:
        raise UserError(f"{model.uri}: has no {DESCRIPTION}; give the output of align or instruct") from error
    except ValidationError as error:
        raise UserError(f"{model.path(DESCRIPTION)}: {error}; train the generator again") from error


def describe(
    stage: Literal["align", "instruct"], images: ImageSource, vdg: VdgConfig, deltas: Iterable[str] = ()
) -> Description:
    """What builds the model again; sizes follow from the features, and what a chooser can say from the labelled deltas."""
    if not isinstance(images, Features):
        return Description(stage=stage, vdg=vdg)
    info = images.embeddings.read_json(INFO)
    texts = tuple(sorted(set(deltas))) if vdg.backbone == "chooser" else ()
    return Description(stage=stage, vdg=vdg, tokens=info["tokens"], dim=info["dim"], texts=texts)


def write_description(output: Output, description: Description, images: ImageSource) -> None:
    """Write it, and of features the mean that centres them."""
    output.write_json(DESCRIPTION, description.model_dump(mode="json"))
    if isinstance(images, Features):
        copy_mean(images, output)
