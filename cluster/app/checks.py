"""What is said before any work of what a run's stages find missing or wrong, and where to get it."""

from collections.abc import Mapping

from cir.benchmarks.triplets import check_attributes
from cluster.app.config import PROJECT, RunConfig
from cluster.driver.demand import nodes, shortages
from cluster.errors import UserError
from cluster.stage import Source, Stage
from cluster.weights import Pretrained, Weights


def check(config: RunConfig, stages: list[Stage]) -> None:
    """Raises UserError listing everything that these stages need and that is missing or does not fit, by the config's field."""
    _refuse(problems(config, stages), config)


def problems(config: RunConfig, stages: list[Stage]) -> dict[str, str]:
    """What these stages need and is missing or does not fit: the config's field -> what was found and what to do."""
    import ray

    there = None if ray.is_initialized() else nodes(config.resources.ray)  # a session's cluster may grow
    own = {field: problem for stage in stages for field, problem in stage.check().items()}
    return own | _reported(config) | unloadable(stages) | (shortages(stages, there) if there else {})


def unloadable(stages: list[Stage]) -> dict[str, str]:
    """Pretrained models of these stages that would not load, each looked at once: first of its fields -> what was found."""
    fields: dict[Pretrained | Weights, list[str]] = {}
    for field, model in ((f, m) for stage in stages for f, m in stage.pretrained.items()):
        fields.setdefault(model, []).append(field)
    found = {}
    for model, (field, *others) in fields.items():
        try:
            model.check()
        except UserError as error:
            also = len(set(others) - {field})
            found[field if not also else f"{field} (and {also} more)"] = str(error)
    return found


def check_sources(config: RunConfig, stages: list[Stage]) -> None:
    """As `check`, of outside files alone."""
    _refuse({field: problem for stage in stages for field, problem in stage.missing().items()}, config)


def _reported(config: RunConfig) -> dict[str, str]:
    """The file of attributes that the report alone reads."""
    field, path = "report.attributes", config.report.attributes
    if path is None:
        return {}
    source = Source(field, path)
    if source.fingerprint() is None:
        return {field: source.problem()}
    try:
        check_attributes(path, field)
    except UserError as error:
        return {field: str(error).removeprefix(f"{field}: ")}
    return {}


def _refuse(problems: Mapping[str, str], config: RunConfig) -> None:
    if problems:
        lines = "\n".join(f"  {field}: {problem}{_origin(config, field, problem)}" for field, problem in problems.items())
        raise UserError(f"{len(problems)} thing(s) are missing or do not fit:\n{lines}")


def _origin(config: RunConfig, field: str, problem: str) -> str:
    """Where the bundled photos are, or what `sources` says of a field: by the longest name that it starts with."""
    if str(PROJECT / "tests" / "data") in problem:
        return "\n    the bundled photos are in the source checkout and the container image, not in the wheel"
    known = [name for name in config.sources if field.startswith(name)]
    return f"\n    {config.sources[max(known, key=len)]}" if known else ""
