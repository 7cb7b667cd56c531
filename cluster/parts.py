"""The unit of resume in a Ray Data stage: one input shard gives one output part."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.monitor import Monitor

if TYPE_CHECKING:
    import ray.data


def run_parts(
    output: Output,
    parts: Mapping[str, int],
    dataset: Callable[[list[str]], "ray.data.Dataset"],
    monitor: Monitor,
    unit: str,
) -> None:
    """Make the parts that are missing from `output` in one Ray Data execution, so that its actors load their models once.

    `parts` maps a part's file name to its number of rows; `dataset` turns names into a Dataset that writes them and
    gives one row {"part", "rows", "seconds"} for each part written (`timed`). A part is renamed into place when it is whole,
    so a killed stage goes on from the parts that exist.
    """
    run_parts_of([Parts(output, parts, monitor)], lambda missing: dataset([name for _, name in missing]), unit)


class Parts(NamedTuple):
    """The parts of an output, with their numbers of rows, and who hears of them."""

    output: Output
    rows: Mapping[str, int]
    monitor: Monitor


def run_parts_of(outputs: Sequence[Parts], dataset: Callable[[list[tuple[int, str]]], "ray.data.Dataset"], unit: str) -> None:
    """As `run_parts`, of several outputs in one execution: of each part is said, and said back as "output", whose it is."""
    missing = []
    for place, (output, rows, monitor) in enumerate(outputs):
        finished = set(output.parts())
        monitor.start(sum(rows.values()), unit, sum(count for name, count in rows.items() if name in finished))
        missing += [(place, name) for name in rows if name not in finished]
    if missing:
        for row in dataset(missing).iter_rows():
            outputs[row.get("output", 0)].monitor.advance(row["rows"], row["seconds"])


def timed(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What makes a part, made to tell the "seconds" that it took."""

    @wraps(make)
    def measured(*arguments: Any, **named: Any) -> dict[str, Any]:
        """As `make`."""
        began = time.monotonic()
        return make(*arguments, **named) | {"seconds": [time.monotonic() - began]}

    return measured


class PartJob(Protocol):
    """What an actor needs to make any part of an output. Pickled to the actors."""

    @property
    def output(self) -> Output:
        """Where the parts go."""


def run_actors(
    actor: type, job: PartJob, parts: Mapping[str, int], resources: ActorResources, monitor: Monitor, unit: str
) -> None:
    """As `run_parts`, on a pool of actors made as `actor(job, cpus)`, each called with one row {"part"} at a time."""
    pooled = type(actor.__name__, (actor,), {"__call__": timed(actor.__call__)})

    def dataset(names: list[str]) -> "ray.data.Dataset":
        """The parts, a row each, through the pool."""
        import ray.data

        return ray.data.from_items([{"part": name} for name in names], override_num_blocks=len(names)).map_batches(
            pooled,
            fn_constructor_args=(job, resources.cpus),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(resources.actors, len(names))),
            **resources.ray_options(),
        )

    run_parts(job.output, parts, dataset, monitor, unit)
