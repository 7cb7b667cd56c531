"""What a run needs from outside, checked before any work: sources, installed weights, batches that fit the workers."""

from collections.abc import Iterator

from cir.benchmarks.triplets import check_attributes
from cluster.app.config import RunConfig
from cluster.artifacts import Stage, fingerprint
from cluster.config import TrainingConfig, WorkerResources
from cluster.errors import UserError
from cluster.weights import Weights


def check(config: RunConfig, stages: list[Stage]) -> None:
    """Raises UserError when something that these stages need is missing or does not fit, naming the config's field."""
    check_sources(config, stages)
    check_weights(config, stages)
    kinds = {stage.kind for stage in stages}
    for kind, training, resources in _trainings(config):
        if kind in kinds:
            training.accumulation(max(resources.workers, 1))
    if "evaluate" in kinds and config.evaluate.attributes:
        check_attributes(config.evaluate.attributes)


def check_sources(config: RunConfig, stages: list[Stage]) -> None:
    """Raises UserError listing every outside file that the stages need and that is missing, and where to get it."""
    missing = {field: _why_missing(path) for stage in stages for field, path in stage.missing_sources().items()}
    _raise_missing("input(s) are missing; correct the path or bring the files", missing, config)


def _why_missing(path: str) -> str:
    try:
        fingerprint(path)
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    return f"{path} does not exist"


def check_weights(config: RunConfig, stages: list[Stage]) -> None:
    """Raises UserError listing the pretrained weights that these stages load and that are missing, and where to get them."""
    missing = {}
    for instances, field, weights in weights_of(config):
        if field not in missing and any(stage.instance.startswith(instances) for stage in stages):
            try:
                weights.check()
            except UserError as error:
                missing[field] = str(error)
    _raise_missing("set(s) of pretrained weights are missing", missing, config)


def _raise_missing(what: str, missing: dict[str, str], config: RunConfig) -> None:
    if missing:
        lines = "\n".join(f"  {field}: {problem}{_origin(config, field)}" for field, problem in missing.items())
        raise UserError(f"{len(missing)} {what}:\n{lines}")


def _origin(config: RunConfig, field: str) -> str:
    """What `sources` says of a field: by the longest name that it starts with."""
    known = [name for name in config.sources if field.startswith(name)]
    return f"\n    {config.sources[max(known, key=len)]}" if known else ""


def weights_of(config: RunConfig) -> Iterator[tuple[str, str, Weights]]:
    """(start of the instances that load them, field, weights) of all pretrained weights that a config names."""
    for name, tower in config.embed.towers.items():
        if tower.weights is not None:
            yield f"embed:{name}.", f"embed.towers.{name}.weights", tower.weights
    for kind in ("align", "instruct", "generate"):
        yield f"{kind}:", "vdg.language_model", config.vdg.language_model
    for name in config.train.variants:
        text = config.train.variant(name).text
        if text is not None and text.weights is not None:
            yield f"train:{name}.", f"train.variants.{name}.text.weights", text.weights


def _trainings(config: RunConfig) -> Iterator[tuple[str, TrainingConfig, WorkerResources]]:
    """(kind of stage, how it trains, its workers)."""
    resources = config.resources
    if config.align is not None:
        yield "align", config.align.training, resources.align
    yield "instruct", config.instruct.training, resources.instruct
    for name in config.train.variants:
        yield "train", config.train.variant(name).training, resources.train
