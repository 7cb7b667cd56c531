"""`vdg doctor`: whether this machine, and what a config names, can do the work."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cluster.app.checks import problems
from cluster.app.commands.options import Set, graph_of
from cluster.app.runner import tracking_uri
from cluster.driver.doctor import Finding, examine
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
    findings = _of_config(config, assignments) if config else examine()
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


def _of_config(config: str, assignments: list[str]) -> list[Finding]:
    """Of the machine, and of what the config's stages would stumble over."""
    graph = graph_of(config, assignments)
    machine = examine(graph.root, tracking_uri(graph.config), graph.config.resources.ray.address)
    halves = {field: problem.rpartition("; ") for field, problem in problems(graph.config, graph.stages).items()}
    wrong = [Finding(field, "blocker", found or rest, rest if found else "") for field, (found, _, rest) in halves.items()]
    whole = Finding(graph.config.name, "ok", f"the files and models of its {len(graph.stages)} stages are there")
    return [*machine, *(wrong or [whole])]
