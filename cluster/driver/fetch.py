"""Pretrained weights brought to where a run reads them: a shared cache once, or the cache of every node."""

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import UserError
from cluster.weights import Weights


def fetch(weights: Weights, cache: str | None) -> str:
    """Bring one source of weights to this node. Returns where it lies.

    `cache` is the folder that runs have as HF_HOME; None: this process's. Of a hub every file of the pinned revision is
    fetched. Raises UserError when the hub does not give it, or a folder or package is not here.
    """
    if weights.hub is None:
        return weights.location()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(weights.hub, revision=weights.revision, cache_dir=cache and f"{cache}/hub")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"weights: '{weights.hub}' cannot be fetched: {reason}; set HF_TOKEN for a gated one") from error


def fetch_on_every_node(sources: list[Weights], cache: str | None) -> dict[str, list[str]]:
    """Bring all sources to each alive node of the session, at the same time. Returns node address -> places or problems.

    A problem starts with "error: ", so that one node's does not hide the others'.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    tasks = {
        f"{address} ({node[:6]})": _fetch_all.options(  # a head without CPUs runs it too
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(sources, cache)
        for node, address in nodes.items()
    }
    found = {}
    for name, task in tasks.items():
        try:
            found[name] = ray.get(task)
        except RayError as error:  # a node that dies over them has none
            found[name] = [f"error: {str(error).strip().splitlines()[-1]}"] * len(sources)
    return found


@ray.remote
def _fetch_all(sources: list[Weights], cache: str | None) -> list[str]:
    found = []
    for source in sources:
        try:
            found.append(fetch(source, cache))
        except UserError as error:
            found.append(f"error: {error}")
    return found
