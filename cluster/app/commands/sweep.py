"""`vdg sweep`: a metric over a grid of a config's fields."""

import itertools
from typing import Annotated

import typer
from rich.table import Table

from cluster.app.commands.options import Config, Set
from cluster.app.sweep import cross_validate
from cluster.driver.progress import answers
from cluster.errors import UserError

app = typer.Typer()


@app.command()
def sweep(
    config: Config,
    grid: Annotated[list[str], typer.Option("--grid", help="section.field=a,b,c; several give their product")],
    assignments: Set = [],  # noqa: B006
    variant: Annotated[str, typer.Option(help="the variant that is trained")] = "supervised",
    folds: Annotated[int, typer.Option(min=2, help="folds of the labelled triplets, each held out once")] = 5,
    metric: Annotated[str, typer.Option(help="metric on the held-out triplets")] = "val_mrr",
) -> None:
    """A table of a metric over a grid, by cross-validation on the training triplets."""
    points = list(itertools.product(*(_axis(axis) for axis in grid)))
    table = Table(
        *(axis.partition("=")[0] for axis in grid), metric, "folds", title=f"{variant}, {folds}-fold cross-validation"
    )
    for point in points:
        values = cross_validate(config, [*assignments, *point], variant, folds, metric)
        cells = [assignment.partition("=")[2] for assignment in point]
        table.add_row(*cells, f"{sum(values) / len(values):.4f}", " ".join(f"{value:.3f}" for value in values))
    answers.print(table)


def _axis(text: str) -> list[str]:
    field, separator, values = text.partition("=")
    if not separator:
        raise UserError(f"--grid {text}: expected section.field=a,b,c")
    return [f"{field}={value}" for value in values.split(",")]
