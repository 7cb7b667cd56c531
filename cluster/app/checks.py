"""What a run needs from outside, checked before any work: sources, installed weights, batches that fit the workers."""

from collections.abc import Iterator

from cir.benchmarks.triplets import check_attributes
from cluster.app.config import RunConfig
from cluster.artifacts import Stage
from cluster.config import WorkerResources
from cluster.errors import UserError
from cluster.training import TrainingConfig
from cluster.weights import Weights


def check(config: RunConfig, stages: list[Stage]) -> None:
    """Raises UserError when something that these stages need is missing or does not fit, naming the config's field."""
    check_sources(stages)
    kinds = {stage.kind for stage in stages}
    for kind, field, weights in _weights(config):
        if kind in kinds:
            _named(field, weights)
    for kind, training, resources in _trainings(config):
        if kind in kinds:
            training.accumulation(max(resources.workers, 1))
    if "evaluate" in kinds and config.evaluate.attributes:
        check_attributes(config.evaluate.attributes)


def check_sources(stages: list[Stage]) -> None:
    """Raises UserError listing every outside file that the stages need and that is missing, by config field."""
    missing = {field: path for stage in stages for field, path in stage.missing_sources().items()}
    if missing:
        lines = "\n".join(f"  {field}: {path} does not exist" for field, path in missing.items())
        raise UserError(f"{len(missing)} input(s) are missing; correct the path or bring the files:\n{lines}")


def _named(field: str, weights: Weights) -> None:
    try:
        weights.location()
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def _weights(config: RunConfig) -> Iterator[tuple[str, str, Weights]]:
    """(kind of stage that loads them, field, weights)."""
    for name, tower in config.embed.towers.items():
        if tower.weights is not None:
            yield "embed", f"embed.towers.{name}.weights", tower.weights
    for kind in ("align", "instruct", "generate"):
        yield kind, "vdg.language_model", config.vdg.language_model
    for name in config.train.variants:
        text = config.train.variant(name).text
        if text is not None and text.weights is not None:
            yield "train", f"train.variants.{name}.text.weights", text.weights


def _trainings(config: RunConfig) -> Iterator[tuple[str, TrainingConfig, WorkerResources]]:
    """(kind of stage, how it trains, its workers)."""
    resources = config.resources
    if config.align is not None:
        yield "align", config.align.training, resources.align
    yield "instruct", config.instruct.training, resources.instruct
    for name in config.train.variants:
        yield "train", config.train.variant(name).training, resources.train
