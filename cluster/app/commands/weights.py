"""`vdg fetch-weights`: pretrained weights on a shared disk or every node, before a run needs them."""

from typing import Annotated

import typer

from cluster.app.commands.options import Config, Set, graph_of
from cluster.driver.progress import console
from cluster.errors import UserError

app = typer.Typer()


@app.command()
def fetch_weights(
    config: Config,
    assignments: Set = [],  # noqa: B006
    cache: Annotated[
        str | None, typer.Option("--cache", help="what runs have as HF_HOME, such as a shared disk; None: HF_HOME")
    ] = None,
    every_node: Annotated[bool, typer.Option("--every-node", help="on each node of resources.ray.address")] = False,
) -> None:
    """Fetch the hub weights that a config names, and check that its packages and folders are there."""
    from cluster.driver import fetch, session

    graph = graph_of(config, assignments)
    fields = {field: weights for stage in graph.stages for field, weights in stage.weights.items()}
    if every_node:
        session.start(graph.config.resources.ray)
        found = fetch.fetch_on_every_node(list(fields.values()), cache)
    else:
        found = {"here": [fetch.fetch(weights, cache) for weights in fields.values()]}
    lines = [(f"{node}: {field}", place) for node, places in found.items() for field, place in zip(fields, places, strict=True)]
    for name, place in lines:
        console.print(f"{name}: {place}")
    failed = [name for name, place in lines if place.startswith("error: ")]
    if failed:
        raise UserError(f"{len(failed)} set(s) of weights are missing, such as {failed[0]}")
