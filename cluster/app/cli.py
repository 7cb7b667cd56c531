"""The command `vdg`."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.app import config as configs
from cluster.app.commands import config as config_commands
from cluster.app.commands import doctor, jobs, lineage, search, weights
from cluster.app.commands.options import Config, Set
from cluster.artifacts import Output, filesystem
from cluster.driver.failures import explained
from cluster.driver.progress import answers, console
from cluster.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.callback()(config_commands.common)
app.add_typer(config_commands.app)
app.add_typer(doctor.app)
app.add_typer(jobs.app)
app.add_typer(lineage.app)
app.add_typer(search.app)
app.add_typer(weights.app)

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
    graph = _graph(config, [*assignments, *([f"rounds.count={rounds}"] if rounds else [])])
    stages = graph.select(None, None, until)
    if dry_run:
        return _show_plan(graph, stages)
    from cluster.app import runner

    runner.run(graph, stages, keep_config=True)
    if until in (None, "evaluate"):
        _finish(graph)


def _stage_command(kind: str) -> Callable[..., None]:
    def command(config: Config, assignments: Set = [], only: Only = None, dry_run: DryRun = False) -> None:  # noqa: B006
        graph = _graph(config, assignments)
        stages = graph.select(kind, only, None)
        if dry_run:
            return _show_plan(graph, stages)
        from cluster.app import runner

        runner.run(graph, stages)

    command.__doc__ = f"All instances of the stage {kind}, or those that match --only, and what they still need."
    return command


for _kind in ("ingest", "embed", "mine", "align", "instruct", "generate", "score", "select", "train"):
    app.command(_kind)(_stage_command(_kind))


@app.command()
def evaluate(config: Config, assignments: Set = [], dry_run: DryRun = False, as_json: Json = False) -> None:  # noqa: B006
    """Score all trained models on the gallery and queries of the evaluate section."""
    graph = _graph(config, assignments)
    stages = graph.select("evaluate", None, None)
    if dry_run:
        return _show_plan(graph, stages)
    from cluster.app import runner

    runner.run(graph, stages)
    if as_json:
        print(json.dumps(runner.metrics_of(graph), indent=1))
    else:
        _show_metrics(graph)


@app.command()
def report(config: Config, assignments: Set = []) -> None:  # noqa: B006
    """Write the report and metrics.json of a run whose stages are finished."""
    graph = _graph(config, assignments)
    unfinished = [stage.instance for stage in graph.stages if graph.output(stage).manifest() is None]
    if unfinished:
        raise UserError(f"{len(unfinished)} stage(s) are not finished, such as {unfinished[0]}: `vdg run {config}` does them")
    _finish(graph)


def _graph(config: str, assignments: list[str]) -> Any:
    loaded = configs.load(config, assignments)
    from cluster.app.graph import Graph

    return Graph(loaded)


def _finish(graph: Any) -> None:
    from cluster.app import runner
    from cluster.app.report import write_report

    folder = runner.run_folder(graph.config)
    folder.write_json("metrics.json", runner.metrics_of(graph))
    _show_metrics(graph)
    console.print(f"metrics: {folder.path('metrics.json')}")
    if graph.config.evaluate.scores_models:
        write_report(graph, folder)
        console.print(f"report:  {folder.path('report.html')}")


def _show_metrics(graph: Any) -> None:
    """A table for each variant of the protocol, the control rows last; and where submission files are."""
    output = graph.output(graph.evaluation)
    rows, controls = output.read_json("metrics.json"), output.read_json("controls.json")
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
    spread = f" ± {_deviation(value['seeds']):.1f}" if len(value["seeds"]) > 1 else ""
    return f"{value['mean']:.1f}{spread}"


def _deviation(values: list[float]) -> float:
    import statistics

    return statistics.stdev(values)


def _show_plan(graph: Any, stages: list[Any]) -> None:
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


@app.command()
def presets() -> None:
    """The presets, a line each."""
    for name, line in configs.presets().items():
        answers.print(f"{name:16} {line}")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where the config is written, as vdg.yaml")],
    images: Annotated[str, typer.Option(help="your images: labelled ones and the unlabelled gallery")],
    triplets: Annotated[str, typer.Option(help="your labelled triplets: JSON list of reference, target, captions")],
    queries: Annotated[str | None, typer.Option(help="test queries; None: the labelled triplets themselves")] = None,
    captions: Annotated[str | None, typer.Option(help="image-caption pairs for stage 1 of the generator")] = None,
) -> None:
    """An annotated config for one's own data, checked against it."""
    from cluster.app.init import write_config

    path = write_config(folder, images, triplets, queries, captions)
    console.print(f"wrote {path}; next: `vdg run {path} --dry-run`, then `vdg run {path}`")


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
    from cluster.app.sweep import cross_validate

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


@app.command(name="ls")
def list_outputs(config: Config, assignments: Set = []) -> None:  # noqa: B006
    """The outputs below the config's root, with sizes, and which of them the config refers to."""
    from cluster.app.outputs import outputs

    graph = _graph(config, assignments)
    used = {graph.output(stage).uri for stage in graph.known}
    table = Table("output", "size", "finished", "used", title=Output(graph.root).uri)
    for found in outputs(graph.root):
        row = f"{found.size / 2**20:,.1f} MB", "yes" if found.finished else "no", "yes" if found.uri in used else "no"
        table.add_row("/".join(filesystem(found.uri)[1].split("/")[-2:]), *row)
    answers.print(table)


@app.command()
def clean(
    config: Config,
    assignments: Set = [],  # noqa: B006
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove the outputs that neither this config nor a config kept in <root>/runs refers to."""
    from cluster.app.outputs import remove, unused

    graph = _graph(config, assignments)
    found = unused(graph)
    if not found:
        console.print("nothing to remove")
        return
    for output in found:
        console.print(f"{output.uri}  {output.size / 2**20:,.1f} MB")
    if yes or typer.confirm(f"remove these {len(found)} outputs?"):
        remove(found)


def main() -> None:
    """Entry point: a user's mistake, or a disk or store that fails, is one message on standard error and exit status 2."""
    try:
        explained(app.__call__)()
    except UserError as error:
        console.print(f"error: {error}", style="red")
        raise SystemExit(2) from None
