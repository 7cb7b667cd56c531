"""`vdg doctor`: whether this machine, and what a config names, can do the work."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cluster.app import config as configs
from cluster.app.commands.options import Set
from cluster.driver.doctor import Setting, examine
from cluster.driver.progress import answers

app = typer.Typer()
COLOURS = {"ok": "green", "warning": "yellow", "blocker": "red"}


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(help="a YAML file or a preset's name, for its root, MLflow and Ray")] = None,
    assignments: Set = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON on standard output")] = False,
) -> None:
    """Versions, GPUs, Ray, MLflow, disk and memory, and what to do about each problem; exit status 1 on a blocker."""
    findings = examine(_setting(config, assignments) if config else Setting())
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        table = Table("subject", "state", "found", "what to do")
        for finding in findings:
            state = Text(finding.state, style=COLOURS[finding.state])
            table.add_row(finding.subject, state, finding.found, finding.advice)
        answers.print(table)
    if any(finding.state == "blocker" for finding in findings):
        raise typer.Exit(1)


def _setting(config: str, assignments: list[str]) -> Setting:
    from cluster.app.runner import tracking_uri

    loaded = configs.load(config, assignments)
    return Setting(loaded.root, tracking_uri(loaded), loaded.resources.ray.address)
