"""Arguments and options that several commands share, and what they give."""

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.app import config as configs

if TYPE_CHECKING:
    from cluster.app.graph import Graph

Config = Annotated[str, typer.Argument(help="a YAML file or a preset's name")]
Set = Annotated[list[str], typer.Option("--set", help="section.field=value, put over the config")]


def graph_of(config: str, assignments: list[str]) -> "Graph":
    """The graph of a config."""
    loaded = configs.load(config, assignments)
    from cluster.app.graph import Graph

    return Graph(loaded)
