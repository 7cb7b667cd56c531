"""`vdg ls` and `vdg clean`: the outputs below a root, and what refers to them."""

from typing import Annotated

import typer
from rich.table import Table

from cluster.app.commands.options import Config, Set, graph_of
from cluster.app.outputs import outputs, remove, users
from cluster.artifacts import Output
from cluster.driver.progress import answers, console

app = typer.Typer()


@app.command(name="ls")
def list_outputs(config: Config, assignments: Set = []) -> None:  # noqa: B006
    """The outputs below the config's root, with sizes, and what refers to them: nothing to those that `vdg clean` removes."""
    graph = graph_of(config, assignments)
    used = users(graph)
    table = Table("output", "size", "finished", "used by", title=Output(graph.root).uri)
    for found in outputs(graph.root):
        row = f"{found.size / 2**20:,.1f} MB", "yes" if found.finished else "no", ", ".join(used.get(found.name, ["nothing"]))
        table.add_row(found.name, *row)
    answers.print(table)


@app.command()
def clean(
    config: Config,
    assignments: Set = [],  # noqa: B006
    models: Annotated[bool, typer.Option("--models", help="also models of earlier runs that have a later one's name")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Remove the outputs that nothing refers to: neither this config, nor one kept in <root>/runs, nor a run's models."""
    graph = graph_of(config, assignments)
    used = {name for name, by in users(graph).items() if not (models and all(user.startswith("models of ") for user in by))}
    found = [output for output in outputs(graph.root) if output.name not in used]
    if not found:
        console.print("nothing to remove")
        return
    for output in found:
        console.print(f"{output.uri}  {output.size / 2**20:,.1f} MB")
    if yes or typer.confirm(f"remove these {len(found)} outputs?"):
        remove(found)
