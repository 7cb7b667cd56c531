"""Whether there is, or may come, what the stages of a run ask for: Ray itself waits without a word, and without an end."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

from cluster.config import Process, Resources
from cluster.driver.session import RayConfig
from cluster.errors import UserError
from cluster.stage import Stage

Node = defaultdict[str, float]  # what it has
MANAGED = "ray.io/node-group"  # Ray's label of nodes that KubeRay or Ray's cluster launcher made, and may make more of


def resources_of(stage: Stage) -> Resources | None:
    """What a stage may use; None of one that works in the driver."""
    return next((value for one in fields(stage) if isinstance(value := getattr(stage, one.name), Resources)), None)


def nodes(config: RayConfig) -> list[Node] | None:
    """Those of the session, or this machine's CPUs and GPUs, where a session will start. None: of a cluster yet to join."""
    import ray

    if ray.is_initialized():
        return [defaultdict(float, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if config.where != "local":
        return None
    import torch
    from ray._private.utils import get_num_cpus

    cpus = config.num_cpus or get_num_cpus()
    return [defaultdict(lambda: math.inf, CPU=float(cpus), GPU=float(torch.cuda.device_count()))]


def shortages(stages: Iterable[Stage], there: Sequence[Node]) -> dict[str, str]:
    """The config's field -> what it asks for that no node has room for, what there is, and what to do."""
    return lacking({f"resources.{stage.kind}": r.least() for stage in stages if (r := resources_of(stage))}, there)


def lacking(wanted: Mapping[str, list[Process]], there: Sequence[Node]) -> dict[str, str]:
    """As `shortages`, of the processes that a field of the config asks for at once."""
    found = f"the cluster has {len(there)} node(s): {', '.join(sorted({_said(node) for node in there}))}"
    return {
        field: f"asks at once for {_all(processes)}; {found}; ask for less, or add nodes"
        for field, processes in wanted.items()
        if not _fit(processes, there)
    }


def require(stages: Iterable[Stage], there: Sequence[Node]) -> list[str]:
    """What a cluster that grows has yet to bring, a line a field. Raises UserError where the session's cluster cannot grow."""
    import ray

    found = [f"{field}: {problem}" for field, problem in shortages(stages, there).items()]
    if found and not any(node["Labels"].get(MANAGED) for node in ray.nodes()):
        raise UserError("\n".join(found))
    return found


def _fit(processes: list[Process], there: Sequence[Node]) -> bool:
    """Whether all find a place, the largest first."""
    free = [node.copy() for node in there]
    for process in sorted(processes, key=lambda each: (each.get("GPU", 0.0), each["CPU"]), reverse=True):
        node = next((n for n in free if all(n[name] + 1e-6 >= value for name, value in process.items())), None)
        if node is None:
            return False
        for name, value in process.items():
            node[name] -= value
    return True


def _all(processes: list[Process]) -> str:
    """Such as `3 x (1 CPU, 1 GPU) and 1 CPU`."""
    counts = Counter(map(_said, processes))
    return " and ".join(said if n == 1 else f"{n} x ({said})" for said, n in counts.items())


def _said(has: Process) -> str:
    """CPUs, GPUs, and what else is asked for or there."""
    kinds = [name.removeprefix("accelerator_type:") for name in has if name.startswith("accelerator_type:")]
    memory = has.get("memory", 0.0) / 2**30
    return ", ".join(
        [f"{has.get('CPU', 0.0):g} CPU", f"{has.get('GPU', 0.0):g} GPU", *([f"{memory:.1f} GB"] if memory else []), *kinds]
    )
