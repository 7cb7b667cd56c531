"""`vdg sweep`: a metric over a grid of a config's fields, by cross-validation on the labelled triplets."""

import itertools
from typing import Annotated

import typer
from rich.table import Table

from cir.train import RESULT
from cluster.app import runner
from cluster.app.commands.options import Config, Set, graph_of
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
    title = f"{variant}, {folds}-fold cross-validation"
    table = Table(*(axis.partition("=")[0] for axis in grid), metric, "folds", title=title)
    for point in points:
        values = [v for fold in range(folds) for v in _held_out(config, [*assignments, *point], variant, folds, fold, metric)]
        cells = [assignment.partition("=")[2] for assignment in point]
        table.add_row(*cells, f"{sum(values) / len(values):.4f}", " ".join(f"{value:.3f}" for value in values))
    answers.print(table)


def _axis(text: str) -> list[str]:
    field, separator, values = text.partition("=")
    if not separator:
        raise UserError(f"--grid {text}: expected section.field=a,b,c")
    return [f"{field}={value}" for value in values.split(",")]


def _held_out(config: str, assignments: list[str], variant: str, folds: int, fold: int, metric: str) -> list[float]:
    """The metric on one fold, for every seed of the config; finished trainings are not repeated."""
    graph = graph_of(config, [*assignments, f"train.validation.folds={folds}", f"train.validation.fold={fold}"])
    train = graph.config.train
    if variant not in train.variants:
        raise UserError(f"--variant {variant}: the config has {sorted(train.variants)}")
    runner.run(graph, graph.select("train", f"train:{variant}.s*", None))
    results = [graph.output(graph[f"train:{variant}.s{seed}"]).read_json(RESULT) for seed in train.seeds]
    if metric not in results[0]:
        raise UserError(f"--metric {metric}: the trainings report {sorted(results[0])}")
    return [result[metric] for result in results]
