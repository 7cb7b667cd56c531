"""Arguments and options that several commands share, and what they give."""

from typing import Annotated

import typer

from cluster.app import config as configs
from cluster.app.graph import Graph

Config = Annotated[str, typer.Argument(help="a YAML file or a preset's name")]
Set = Annotated[list[str], typer.Option("--set", help="section.field=value, put over the config")]


def graph_of(config: str, assignments: list[str]) -> Graph:
    """The graph of a config."""
    return Graph(configs.load(config, assignments))
