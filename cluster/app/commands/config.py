"""`vdg presets`, `init`, `show` and `schema`, and `vdg --version`: what a config may say, and what one comes to."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
import yaml

from cluster.app import config as configs
from cluster.app.commands.options import Config, Set
from cluster.app.init import write_config
from cluster.config import in_folder
from cluster.driver.progress import answers, console, printable
from cluster.redaction import hidden

app = typer.Typer()


@app.command()
def presets() -> None:
    """The presets, a line each."""
    for name, line in configs.presets().items():
        answers.print(f"{name:16} {line}")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where the config is written, as vdg.yaml")],
    images: Annotated[str, typer.Option(help="your images: labelled ones and the unlabelled gallery")],
    triplets: Annotated[str, typer.Option(help="your labelled triplets: JSON, CSV or Parquet of reference, target, captions")],
    queries: Annotated[str | None, typer.Option(help="test queries; None: a fifth of the triplets, held out by image")] = None,
    captions: Annotated[str | None, typer.Option(help="image-caption pairs for stage 1 of the generator")] = None,
) -> None:
    """An annotated config for one's own data, checked against it."""
    path = write_config(folder, images, triplets, queries, captions)
    console.print(f"wrote {path}; next: `vdg run {path} --dry-run`, then `vdg run {path}`")


@app.command()
def schema() -> None:
    """The JSON Schema of a config file, for editors that complete and check YAML."""
    schema = configs.RunConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)  # a file may leave to others what it extends
    said = "presets or files that this one is put over: a name, a path, or a list of them"
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}], "description": said}
    print(json.dumps(schema | {"properties": {"extends": names} | schema["properties"]}, indent=1))


@app.command()
def show(config: Config, assignments: Set = []) -> None:  # noqa: B006
    """A config in YAML as a run takes it: with all that it extends, and the defaults of what it leaves out."""
    content = in_folder(configs.RunConfig, configs.load(config, assignments).model_dump(mode="json"), Path.cwd())
    text = yaml.safe_dump(hidden(content), sort_keys=False, allow_unicode=True, width=120)
    print(printable(text), end="")  # YAML escapes what is not printable but the marks that turn a text


def _print_version(asked: bool) -> None:
    if asked:
        print(f"vdg {version('visual-delta')}")
        raise typer.Exit


def common(
    asked: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Options of `vdg` itself."""
