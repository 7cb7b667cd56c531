"""The graph of stage instances of a run, made from its config before anything starts."""

from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property

from cluster.app.stages.evaluation import Evaluation
from cluster.artifacts import Stage
from cluster.errors import UserError

KINDS = ("ingest", "embed", "mine", "align", "instruct", "generate", "score", "select", "train", "evaluate")


class Pipeline(Evaluation):
    """Every stage instance of a run. A digest follows from the config alone."""

    @cached_property
    def stages(self) -> list[Stage]:
        """All instances, parents before children; of those that could come next, the earliest kind first."""
        waiting = {stage.instance: stage for stage in _with_ancestors(self.evaluation)}
        ordered: dict[str, Stage] = {}
        while waiting:
            ready = [s for s in waiting.values() if all(parent.instance in ordered for parent in s.parents.values())]
            stage = min(ready, key=lambda stage: KINDS.index(stage.kind))
            ordered[stage.instance] = waiting.pop(stage.instance)
        return list(ordered.values())

    def select(self, kind: str | None, only: str | None, until: str | None) -> list[Stage]:
        """The instances asked for, and the ancestors they need. Raises UserError when nothing matches."""
        if until is not None and until not in KINDS:
            raise UserError(f"--until {until}: no such stage; stages are {', '.join(KINDS)}")
        last = KINDS.index(until) if until else len(KINDS)
        chosen = [
            stage
            for stage in self.stages
            if kind in (None, stage.kind) and fnmatch(stage.instance, only or "*") and KINDS.index(stage.kind) <= last
        ]
        if not chosen:
            raise UserError(f"no stage instance matches {only or kind}; `--dry-run` lists them")
        needed = {ancestor.instance for stage in chosen for ancestor in _with_ancestors(stage)}
        return [stage for stage in self.stages if stage.instance in needed]


def _with_ancestors(stage: Stage) -> Iterator[Stage]:
    """Every ancestor once, parents before children, then the stage itself."""
    seen: set[str] = set()

    def visit(node: Stage) -> Iterator[Stage]:
        if node.instance not in seen:
            seen.add(node.instance)
            for parent in node.parents.values():
                yield from visit(parent)
            yield node

    yield from visit(stage)
