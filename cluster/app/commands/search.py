"""`vdg search` and `vdg serve`: what was trained, asked by a photo and a text."""

import getpass
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import jinja2
import typer
from rich.table import Table

from cir.index import data_uri, thumbnail
from cluster.app import config as configs
from cluster.app.api import Hit, Run
from cluster.app.commands.options import Config, Set, graph_of
from cluster.app.labels import Labelling, Store, freeze
from cluster.driver.progress import answers, console
from cluster.errors import UserError
from cluster.redaction import without_user

app = typer.Typer()

Models = Annotated[
    str | None,
    typer.Option(
        "--models",
        help="such as supervised.s0,semi.s0; None: the recommended one; serve shows the first of each other variant too",
    ),
]


@app.command()
def search(
    config: Config,
    image: Annotated[str, typer.Option("--image", help="a file, or the key of an image of the gallery")],
    text: Annotated[str, typer.Option("--text", help="what should differ")],
    assignments: Set = [],  # noqa: B006
    models: Models = None,
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="images a model")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print the answer as JSON on standard output")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="draw the answer into this file")] = None,
) -> None:
    """The photos of the evaluate section's gallery that a photo and a text ask for, as the run's models rank them."""
    if html is not None and not html.absolute().parent.is_dir():
        raise UserError(f"--html {html}: its folder does not exist; make it")
    run = Run(graph_of(config, assignments))
    reference = run.reference(image)
    found = {name: run.hits(run.searcher.search(name, reference, text, top)) for name in run.chosen(models)}
    if as_json:
        print(json.dumps({name: [asdict(hit) for hit in hits] for name, hits in found.items()}, indent=1))
    else:
        _show(found)
    if html is not None:
        html.write_text(_page(run, image, text, found))
        console.print(f"drawn in {html}")


def _show(found: Mapping[str, list[Hit]]) -> None:
    table = Table("rank", *(column for name in found for column in (name, "score")))
    for row in zip(*found.values(), strict=True):
        table.add_row(str(row[0].rank), *(cell for hit in row for cell in (hit.key, f"{hit.score:.3f}")))
    answers.print(table)


def _page(run: Run, image: str, text: str, found: Mapping[str, list[Hit]]) -> str:
    """One HTML file that holds its pictures."""
    folder = Path(__file__).parents[1]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined)
    pictures = {hit.image_id: data_uri(run.thumbnails.get(hit.image_id, b"")) for hits in found.values() for hit in hits}
    reference = (
        thumbnail(Path(image).read_bytes()) if Path(image).is_file() else run.thumbnails.get(run.searcher.image_id(image), b"")
    )
    return environment.get_template("serve/answer.html.j2").render(
        reference=data_uri(reference), image=Path(image).name, text=text, found=found, pictures=pictures
    )


@app.command()
def serve(
    config: Config,
    assignments: Set = [],  # noqa: B006
    models: Models = None,
    host: Annotated[str, typer.Option("--host", help="address to bind; any but loopback needs --token-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    token_file: Annotated[Path | None, typer.Option("--token-file", help="a file whose content clients have to give")] = None,
    names: Annotated[list[str], typer.Option("--name", help="a further host name that browsers call it by")] = [],  # noqa: B006
    author: Annotated[str | None, typer.Option("--author", help="whose labels are kept; None: this user")] = None,
    on_ray: Annotated[bool, typer.Option("--ray", help="on Ray Serve, with the replicas of resources.serve")] = False,
) -> None:
    """A page and an API that search the gallery with the run's models, on this machine alone, or on Ray Serve."""
    if on_ray:
        from cluster.app.serve.ray import Options, serve_on_ray

        options = Options(models=models, token_file=token_file, names=[host, *names], author=author or getpass.getuser())
        serve_on_ray(configs.load(config, assignments), options, host, port)
        return
    from cluster.app.serve.local import local_app, read_token, serve_forever

    token = read_token(host, token_file)
    run = Run(graph_of(config, assignments))
    app = local_app(run, run.served(models), [host, *names], token, author or getpass.getuser())
    serve_forever(app, host, port, token)


@app.command()
def labels(
    action: Annotated[Literal["list", "freeze"], typer.Argument(help="print them as JSON lines, or make them a source")],
    config: Config,
    assignments: Set = [],  # noqa: B006
) -> None:
    """What people said on the page of `vdg serve`: of the generator's deltas, and of search results."""
    run = Run(graph_of(config, assignments))
    if action == "list":
        for label in Store(run).last().values():
            print(json.dumps(label, ensure_ascii=False))
        measured = Labelling(run).precision() if run.pseudo_triplets is not None else None
        console.print(str(measured or "no uniformly drawn pair is judged yet: nothing is known of the generator's precision"))
        return
    for made in freeze(run):
        whose = ", ".join(f"{count} by {author}" for author, count in made.authors.items())
        console.print(f"{without_user(made.file)}: {made.rows} labelled triplets ({whose}) of the gallery '{made.gallery}'")
        if made.gallery == "evaluate":
            console.print(
                "  no gallery of ingest.galleries has these photos: add one that does, with its own triplets, to train on"
            )
        answers.print(without_user(made.file))
