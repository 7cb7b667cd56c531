"""Commands that trace: what made an output and what it made, and whether its files are still those that were made."""

import json
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from cluster.app import config as configs
from cluster.app.api import Run
from cluster.app.commands.options import Config, Set, graph_of
from cluster.app.export import export as write
from cluster.app.runner import headline, record_results, tracking_uri
from cluster.artifacts import Output
from cluster.driver.lineage import Lineage, Made, problems
from cluster.driver.mlflow_store import sqlite_uri
from cluster.driver.progress import answers, console
from cluster.errors import UserError
from cluster.redaction import without_user

app = typer.Typer()

Place = Annotated[str, typer.Argument(help="a config, a preset's name, or the root folder of the outputs")]
Model = Annotated[
    str, typer.Argument(help="a model (semi.s1), an instance (instruct:vdg), a digest, or of a config recommended")
]
RUN_ID = re.compile("[0-9a-f]{32}")


@app.command()
def lineage(
    place: Place,
    name: Annotated[str, typer.Argument(help="an instance, a model (semi.s1), a digest, an MLflow run id, or a pattern")],
    as_json: Annotated[bool, typer.Option("--json", help="print the trees as JSON on standard output")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="draw the lineage into this file")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="compare the files with their manifests; exit code 1 if they differ")
    ] = False,
    assignments: Set = [],  # noqa: B006
) -> None:
    """What an output was made from and what was made from it, as the manifests say."""
    if html is not None and not html.absolute().parent.is_dir():
        raise UserError(f"--html {html}: its folder does not exist; make it")
    root, uri = _root(place, assignments)
    found = Lineage(root)
    made = found.find(_digest_of_run(name, uri) if RUN_ID.fullmatch(name) else name)
    if not made:
        raise UserError(
            f"{name}: no finished output below {Output(root).uri} has this name, digest or run; `vdg ls` lists them"
        )
    shown = {near: value for one in made for near, value in found.around(one).items()}
    if as_json:
        print(json.dumps([_as_json(found, one) for one in made], indent=1))
    else:
        for one in made:
            _show(found, one)
    if html is not None:
        from cluster.app.lineage_page import page

        html.write_text(page(found, shown, {one.name for one in made}, without_user(Output(root).uri)))
        console.print(f"drawn in {html}")
    if check:
        _check(shown)


@app.command()
def track(config: Config, assignments: Set = []) -> None:  # noqa: B006
    """Write into MLflow what it lacks of the run's finished stages; done again, it changes nothing.

    A SQLite file that is damaged is set aside, and a new one made.
    """
    from cluster.driver.mlflow_store import said, set_aside
    from cluster.driver.tracking import Tracker

    graph = graph_of(config, assignments)
    run, uri = graph.config, tracking_uri(graph.config)
    finished = [stage for stage in graph.stages if graph.output(stage).manifest() is not None]
    with said(uri):
        aside = set_aside(uri)
    if aside is not None:
        console.print(f"MLflow's database was damaged; it is kept as {aside}, and a new one is made")
    if not finished and aside is None:
        raise UserError(f"{run.name}: no stage is finished below {Output(run.root).uri}; `vdg run {config}` does them")
    tracker = Tracker(uri, run.tracking.experiment, run.name, run.model_dump(mode="json"), again=True)
    with said(uri):
        written = sum(tracker.complete(stage, run.root) for stage in finished)
    if len(finished) == len(graph.stages):
        record_results(graph, tracker)
    if tracker.parent in tracker.at_work:  # it was made here
        tracker.finish("FINISHED", headline(graph))
    console.print(f"{written} of {len(finished)} finished stages were not whole in MLflow at {uri}; now they are")


@app.command()
def export(
    place: Place,
    model: Model,
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    assignments: Set = [],  # noqa: B006
) -> None:
    """A trained model as PEFT adapter or safetensors, with a model card; says what needs this package."""
    for note in write(*_model(place, assignments, model), folder):
        console.print(note)
    console.print(f"exported to {folder}")


@app.command()
def push(
    place: Place,
    model: Model,
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub, made private where it is new")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files; send nothing")] = False,
    assignments: Set = [],  # noqa: B006
) -> None:
    """Send an export to the Hugging Face hub, as the user that `hf auth login` knows."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: {error}; give owner/name") from error
    found, made = _model(place, assignments, model)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / repository.rpartition("/")[2]
        write(found, made, exported)
        for path in sorted(exported.iterdir()):
            answers.print(f"{path.name}  {path.stat().st_size / 2**20:,.1f} MB")
        if dry_run:
            return
        try:
            HfApi().create_repo(repository, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=repository, folder_path=exported, commit_message=made.name)
        except OSError as error:
            raise UserError(f"{repository}: the hub does not take it ({error}); `hf auth login` first") from error
    console.print(f"{made.name} is in {repository}")


def _model(place: str, assignments: list[str], model: str) -> tuple[Lineage, Made]:
    """The one output of a name, or a config's recommended model. Raises UserError where there is none, or several."""
    if model == "recommended":
        if "://" in place or Path(place).is_dir():
            raise UserError("recommended: a root may hold several runs; give the config of one, or the model's name")
        graph = graph_of(place, assignments)
        model = graph.models[Run(graph).recommended].digest
    lineage = Lineage(_root(place, assignments)[0])
    made = lineage.find(model)
    if len(made) != 1:
        names = ", ".join(one.name for one in made) or "none"
        where = Output(lineage.root).uri
        raise UserError(f"{model}: expected one finished output below {where}, found {names}; give its digest")
    return lineage, made[0]


def _root(place: str, assignments: list[str]) -> tuple[str, str | None]:
    """The root of a config or of a folder, and its MLflow store."""
    if "://" in place or Path(place).is_dir():
        store = Path(place) / "mlflow.db"
        return place, sqlite_uri(store.resolve()) if store.is_file() else None
    config = configs.load(place, assignments)
    return config.root, tracking_uri(config)


def _digest_of_run(run_id: str, uri: str | None) -> str:
    if uri is None:
        raise UserError(f"{run_id}: a root without mlflow.db knows no MLflow runs; give the config, with its tracking.uri")
    from cluster.driver.mlflow_store import connect, reason, said

    with said(uri):
        client = connect(uri)
    try:
        tags = client.get_run(run_id).data.tags
    except Exception as error:  # whatever the store's backend raises
        raise UserError(f"{run_id}: MLflow at {uri} does not give this run ({reason(error)})") from error
    if "digest" not in tags:
        raise UserError(f"{run_id}: is not the run of a stage; give one of its child runs")
    return tags["digest"]


def _show(lineage: Lineage, made: Made) -> None:
    tree = Tree(_label(made))
    for title, step in (("made from", lineage.above), ("was used for", lineage.below)):
        if step(made):
            _grow(tree.add(Text(title, style="bold")), step, made, set())
    answers.print(tree)


def _grow(tree: Tree, step: Any, made: Made, seen: set[str]) -> None:
    """An output that comes twice is followed once: the second time it ends in dots."""
    for role, near in step(made):
        known = near.name in seen
        seen.add(near.name)
        dots = " ..." if known and step(near) else ""
        branch = tree.add(Text.assemble((f"{role}:", "dim"), f" {_label(near)}{dots}"))
        if not known:
            _grow(branch, step, near, seen)


def _label(made: Made) -> str:
    said = ", ".join(filter(None, (made.rows, made.whose)))
    return f"{made.name} ({said})" if said else made.name


def _as_json(lineage: Lineage, made: Made) -> dict[str, Any]:
    """Each output once, with its parents and children by `instance-digest`."""
    outputs = {
        name: {
            "instance": near.instance,
            "digest": near.digest,
            "output": without_user(near.output.uri),
            "finished": near.manifest is not None,
            "rows": near.manifest["rows"] if near.manifest else None,
            "authors": near.authors,
            "sources": near.manifest["sources"] if near.manifest else {},
            "parents": {role: parent.name for role, parent in lineage.above(near)},
            "children": sorted({child.name for _, child in lineage.below(near)}),
        }
        for name, near in sorted(lineage.around(made).items())
    }
    return {"name": made.name, "outputs": outputs}


def _check(shown: dict[str, Made]) -> None:
    found = [line for made in shown.values() for line in problems(made)]
    for line in found:
        console.print(line, style="red")
    if found:
        raise typer.Exit(1)
    console.print(f"the files of {len(shown)} outputs are those of their manifests")
