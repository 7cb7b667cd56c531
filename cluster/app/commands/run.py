"""`vdg run`, a command for each stage, `vdg evaluate` and `vdg report`."""

import json
from collections.abc import Callable
from statistics import stdev
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.app import runner
from cluster.app.checks import check
from cluster.app.commands.options import Config, Set, graph_of
from cluster.app.graph import KINDS, Graph
from cluster.app.recommend import recommend
from cluster.artifacts import Output
from cluster.driver.progress import answers, console
from cluster.errors import UserError
from cluster.stage import Stage

app = typer.Typer()

DryRun = Annotated[bool, typer.Option("--dry-run", help="show the stages and what would be done; touch nothing")]
Only = Annotated[str | None, typer.Option("--only", help="pattern of instances, such as 'train:semi.*'")]
Json = Annotated[bool, typer.Option("--json", help="print the metrics as JSON on standard output")]


@app.command()
def run(
    config: Config,
    assignments: Set = [],  # noqa: B006
    dry_run: DryRun = False,
    until: Annotated[str | None, typer.Option("--until", help="the last stage to do")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="of the generator; sets rounds.count")] = None,
) -> None:
    """Every stage in order, then the report; finished stages are skipped."""
    graph = graph_of(config, [*assignments, *([f"rounds.count={rounds}"] if rounds else [])])
    stages = graph.select(None, None, until)
    if dry_run:
        return _show_plan(graph, stages)
    runner.run(graph, stages, keep_config=True)
    if until in (None, graph.results.kind):
        _show_results(graph, runner.run_folder(graph.config))


def _stage_command(kind: str) -> Callable[..., None]:
    def command(config: Config, assignments: Set = [], only: Only = None, dry_run: DryRun = False) -> None:  # noqa: B006
        graph = graph_of(config, assignments)
        stages = graph.select(kind, only, None)
        if dry_run:
            return _show_plan(graph, stages)
        runner.run(graph, stages)

    command.__doc__ = f"All instances of the stage {kind}, or those that match --only, and what they still need."
    return command


for _kind in KINDS:
    if _kind != "evaluate":
        app.command(_kind)(_stage_command(_kind))


@app.command()
def evaluate(config: Config, assignments: Set = [], dry_run: DryRun = False, as_json: Json = False) -> None:  # noqa: B006
    """Score all trained models on the gallery and queries of the evaluate section."""
    graph = graph_of(config, assignments)
    stages = graph.select(graph.results.kind, None, None)
    if dry_run:
        return _show_plan(graph, stages)
    runner.run(graph, stages)
    if as_json:
        print(json.dumps(runner.metrics_of(graph), indent=1))
    else:
        _show_metrics(graph)


@app.command()
def report(config: Config, assignments: Set = []) -> None:  # noqa: B006
    """Write the report and metrics.json of a run whose stages are finished."""
    graph = graph_of(config, assignments)
    unfinished = [stage.instance for stage in graph.stages if graph.output(stage).manifest() is None]
    if unfinished:
        raise UserError(f"{len(unfinished)} stage(s) are not finished, such as {unfinished[0]}: `vdg run {config}` does them")
    _show_results(graph, runner.write_results(graph))


def _show_results(graph: Graph, folder: Output) -> None:
    _show_metrics(graph)
    if recommended := recommend(graph):
        answers.print(f"recommended: {recommended.model}: {recommended.reason}")
    console.print(f"metrics: {folder.path('metrics.json')}")
    if graph.config.evaluate.scores_models:
        console.print(f"report:  {folder.path('report.html')}")


def _show_metrics(graph: Graph) -> None:
    """A table for each variant of the protocol, the control rows last; and where submission files are."""
    output = graph.output(graph.evaluation)
    rows, controls = runner.metrics_of(graph), output.read_json("controls.json")
    for protocol in output.read_json("protocols.json"):
        if rows:
            _show_protocol(protocol, rows, controls["metrics"])
    for row, reason in controls["left_out"].items() if rows else ():
        answers.print(f"no row {row}: {reason}")
    if output.exists("submissions"):
        answers.print(f"submission files: {output.path('submissions')}")


def _show_protocol(protocol: dict[str, Any], rows: dict[str, Any], controls: dict[str, Any]) -> None:
    names = protocol["metrics"]
    table = Table("variant", *names.values(), title=protocol["description"], title_justify="left")
    for section in (rows, controls):
        for variant, row in section.items():
            table.add_row(variant, *(_cell(row[name]) for name in names))
        table.add_section()
    answers.print(table)


def _cell(value: dict[str, Any]) -> str:
    spread = f" ± {stdev(value['seeds']):.1f}" if len(value["seeds"]) > 1 else ""
    return f"{value['mean']:.1f}{spread}"


def _show_plan(graph: Graph, stages: list[Stage]) -> None:
    """Raises UserError after it when what is to do would be refused."""
    answers.print(f"{graph.config.name}: {len(stages)} stage instances below {Output(graph.root).uri}")
    table = Table("stage", "state", "output")
    for stage in stages:
        output = graph.output(stage)
        parts = len(output.parts())
        state = "done, skipped" if output.manifest() else f"goes on: {parts} parts exist" if parts else "to do"
        table.add_row(stage.instance, state, f"{stage.kind}/{output.uri.rpartition('/')[2]}")
    answers.print(table)
    found = {source.field: (source.path, stage.fingerprints[f]) for stage in stages for f, source in stage.sources.items()}
    for field, (path, fingerprint) in found.items():
        answers.print(f"  {'missing' if fingerprint is None else 'found  '} {field}: {path}")
    check(graph.config, [stage for stage in stages if graph.output(stage).manifest() is None])
