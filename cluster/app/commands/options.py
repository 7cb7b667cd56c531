"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="a YAML file or a preset's name")]
Set = Annotated[list[str], typer.Option("--set", help="section.field=value, put over the config")]
