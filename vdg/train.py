"""The stages align and instruct: what trains the Visual Delta Generator."""

from cluster.artifacts import Output
from cluster.config import WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.training.loop import train
from cluster.weights import content_identity
from mining import tables
from mining.features import Features, copy_mean
from vdg.config import DESCRIPTION, AlignConfig, Description, InstructConfig, Stage, VdgConfig, read_description
from vdg.images import ImageSource

ALIGN_VERSION = 2
INSTRUCT_VERSION = 2


def align(
    output: Output,
    features: Features,
    captions: Output,
    vdg: VdgConfig,
    config: AlignConfig,
    seed: int,
    resources: WorkerResources,
    monitor: Monitor,
) -> None:
    """Stage 1: train the projection on image-caption pairs (paper, Algorithm 1)."""
    from vdg.data import AlignTask

    _require_rows(captions, "captions")
    features.check(
        captions.read_parts(tables.CAPTIONS, ["image_id"])["image_id"].to_numpy(), f"align.captions ({captions.uri})"
    )
    description = _describe(output, "align", features, vdg)
    train(output, AlignTask(features, captions, description, config), config.training, seed, resources, monitor)


def instruct(
    output: Output,
    images: ImageSource,
    triplets: Output,
    aligned: Output | None,
    vdg: VdgConfig,
    config: InstructConfig,
    seed: int,
    resources: WorkerResources,
    monitor: Monitor,
) -> None:
    """Stage 2: train projection and LoRA on triplets, from the aligned projection where given (paper, Algorithm 2).

    `images` are features or pixels, whichever the backbone sees.
    """
    from vdg.data import InstructTask

    _require_rows(triplets, "triplets")
    images.check(tables.images_of(triplets.read_parts(tables.TRIPLETS)), f"instruct.triplets ({triplets.uri})")
    description = _describe(output, "instruct", images, vdg)
    if aligned is not None:
        _check_aligned(read_description(aligned), description)
    train(output, InstructTask(images, triplets, aligned, description, config), config.training, seed, resources, monitor)


def describe(stage: Stage, images: ImageSource, vdg: VdgConfig) -> Description:
    """What builds the model again; the size of its projection follows from the features."""
    if not isinstance(images, Features):
        return Description(stage=stage, vdg=vdg)
    info = images.embeddings.read_json("info.json")
    return Description(stage=stage, vdg=vdg, tokens=info["tokens"], dim=info["dim"])


def _describe(output: Output, stage: Stage, images: ImageSource, vdg: VdgConfig) -> Description:
    """Write what rebuilds the model; checks its weights before anything is loaded."""
    vdg.language_model.location()
    description = describe(stage, images, vdg)
    output.write_json(DESCRIPTION, description.model_dump(mode="json"))
    if isinstance(images, Features):
        copy_mean(images.embeddings, output)
    return description


def _require_rows(table: Output, what: str) -> None:
    if not sum(table.part_rows().values()):
        raise UserError(f"{what}: {table.uri} has no rows; give a file with at least one")


def _check_aligned(aligned: Description, now: Description) -> None:
    """Raises UserError naming the first setting in which the aligned projection does not fit this model."""
    trained, wanted = content_identity(aligned.vdg), content_identity(now.vdg)
    for name in ("language_model", "projection", "tokens_per_feature", "center"):
        before, after = trained[name], wanted[name]
        if before != after:
            raise UserError(f"vdg.{name}: {after}, but the aligned projection was trained with {before}; run align again")
    if aligned.dim != now.dim:
        raise UserError(f"features are {now.dim} wide, the aligned projection takes {aligned.dim}; use the same image tower")
