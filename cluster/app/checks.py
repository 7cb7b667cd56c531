"""What is said before any work of what a run's stages find missing or wrong, and where to get it."""

from collections.abc import Mapping

from cir.benchmarks.triplets import check_attributes
from cluster.app.config import PROJECT, RunConfig
from cluster.errors import UserError
from cluster.stage import Source, Stage


def check(config: RunConfig, stages: list[Stage]) -> None:
    """Raises UserError listing everything that these stages need and that is missing or does not fit, by the config's field."""
    _refuse({field: problem for stage in stages for field, problem in stage.check().items()} | _reported(config), config)


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
