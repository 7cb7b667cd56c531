"""Stages of vdg over outputs that a test has made: align to generate."""

from typing import Any

import torch
from safetensors.torch import save

from cluster.artifacts import Output
from cluster.config import (
    ActorResources,
    WorkerResources,
)
from cluster.monitor import Monitor
from cluster.training.checkpoints import WEIGHTS
from mining.features import Features, copy_mean
from tests.stages import center_of, centred_by_own, given, maybe, running, seen
from vdg.align import Align
from vdg.backbones import build
from vdg.config import AlignConfig, GenerateConfig, InstructConfig, VdgConfig
from vdg.description import DESCRIPTION, Description
from vdg.generate import Generate
from vdg.images import ImageSource
from vdg.instruct import Instruct


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
    Align(
        name="vdg",
        captions=given(captions),
        **seen(features),
        center=center_of(features),
        vdg=vdg,
        align=config,
        seed=seed,
        resources=resources,
    ).work(output, running(monitor))


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
    stage = Instruct(
        name="vdg",
        triplets=given(triplets),
        **seen(images),
        center=maybe(images.center) if isinstance(images, Features) else None,
        aligned=maybe(aligned),
        vdg=vdg,
        instruct=config,
        seed=seed,
        resources=resources,
    )
    stage.work(output, running(monitor))


def generate(
    output: Output,
    images: ImageSource,
    pairs: Output,
    model: Output,
    config: GenerateConfig,
    seed: int,
    resources: ActorResources,
    monitor: Monitor,
) -> None:
    made: Any = given(model)
    Generate(
        name="g",
        pairs=given(pairs),
        vdg=made,
        **seen(images),
        config=config,
        seed=seed,
        resources=resources,
    ).work(output, running(monitor))


def untrained(output: Output, description: Description, embeddings: Output) -> Output:
    """A generator as `instruct` leaves it, untrained."""
    output.write_json(DESCRIPTION, description.model_dump(mode="json"))
    copy_mean(centred_by_own(embeddings), output)
    torch.manual_seed(0)
    module = build(description)
    output.write_bytes(WEIGHTS, save({name: p.detach() for name, p in module.named_parameters() if p.requires_grad}))
    return output
