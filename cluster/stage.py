"""A stage: a frozen dataclass whose fields say what its output depends on.

| a field that is | means |
|---|---|
| a `Stage`, or a tuple or mapping of them | a parent: its digest counts, or its rule where the field is LOOKED_UP |
| a config section, a number, a text, a flag | content |
| a `Source` | an outside file or folder: its fingerprint counts |
| `Resources` or a `Limit` | nothing of the content: another cluster, the same output |

Digest, parents, checks, dry run, manifest and MLflow's record read the fields; nothing is listed a second time.
"""

import json
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from cluster.artifacts import (
    ENVIRONMENT,
    MANIFEST,
    REUSED,
    Output,
    filesystem,
    fingerprint,
    output_of,
    outputs_of,
    read_warnings,
)
from cluster.config import Resources, content_of
from cluster.errors import UserError
from cluster.manifest import Manifest, digest_of, sealed
from cluster.monitor import Monitor, Several
from cluster.provenance import code
from cluster.redaction import without_user
from cluster.verify import described, differences, remove_broken, verify
from cluster.weights import Pretrained, Weights, models_in

if TYPE_CHECKING:
    from cluster.training.groups import Groups

# Metadata of a field whose parents are read by id: how their rows are made counts, not which rows there are. What names the
# ids, such as the labelled triplets, is another parent. A gallery that grows leaves such a stage as it is.
LOOKED_UP = {"looked_up": True}


class Limit(float):
    """A bound on what a stage accepts. Never content: another bound, the same output."""


@dataclass(frozen=True)
class Source:
    """An outside file or folder, and the config field that names it.

    `kept`: rows of the output hold this path, so that it is content too.
    """

    field: str
    path: str
    kept: bool = False

    def fingerprint(self) -> Any:
        """Name, size and modification time of every file; None where this machine sees none.

        None also for a store out of reach: who submits a run need not have the cluster's keys.
        """
        try:
            found = fingerprint(self.path)
        except (OSError, ValueError):
            return None
        return [without_user(Output(self.path).uri), found] if self.kept and found is not None else found

    def secret(self) -> str | None:
        """What is wrong with a path that rows would keep, password and all."""
        if not self.kept or "://" not in self.path or without_user(self.path) == self.path:
            return None
        return "it holds a password, which the output's rows would keep; put it in the environment (AWS_SECRET_ACCESS_KEY, ...)"

    def problem(self) -> str:
        """Why there is no fingerprint."""
        try:
            fingerprint(self.path)
        except (OSError, ValueError) as error:
            return f"{self.path} cannot be read: {error}"
        return f"{self.path} does not exist; correct the path or bring the files"


@dataclass(frozen=True)
class RunContext:
    """What a run shares with the stage at work: where outputs live, who watches, and workers that have trained before."""

    root: str
    monitor: Monitor
    groups: "Groups | None" = None

    def output(self, stage: "Stage") -> Output:
        """Where a stage's output lives."""
        return stage.output(self.root)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage(ABC):
    """One named instance of a stage, known before anything runs. Its kind is its class's name, unless the class gives one."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1  # counts changes of the class's code that change its output
    table: ClassVar[str | None] = None  # what MLflow calls the table that it writes
    model: ClassVar[str | None] = None  # what MLflow calls the model that it trains
    loader: ClassVar[str | None] = None  # the module through which `mlflow.pyfunc` loads that model

    name: str

    def __init_subclass__(cls, kind: str | None = None) -> None:
        """`kind` is for a class that is one of several of its kind."""
        if kind is not None or Stage in cls.__bases__:
            cls.kind = kind or cls.__name__.lower()

    @abstractmethod
    def work(self, output: Output, run: RunContext) -> None:
        """Write the output; what an earlier run of it left there is kept where it is whole."""

    def joins(self, other: "Stage") -> bool:
        """Whether both are one piece of work when both are ready, as `work_together` does it."""
        return False

    @classmethod
    def work_together(cls, stages: Sequence[tuple["Stage", Output, "RunContext"]]) -> None:
        """As `work`, of stages that join one another."""
        for stage, output, run in stages:
            stage.work(output, run)

    @property
    def instance(self) -> str:
        """`<kind>:<name>`, such as `embed:photo.shop`."""
        return f"{self.kind}:{self.name}"

    @property
    def reject_limit(self) -> float:
        """Share of rejected rows above which the stage fails: its `Limit`, or none of them."""
        return next((value for _, value, _ in self._flat() if isinstance(value, Limit)), 0.0)

    def config_field(self, name: str) -> str:
        """The config's name of a field that is a section: `config` is the section that has the stage's name."""
        return self.kind if name == "config" else name

    def _flat(self) -> Iterator[tuple[str, Any, bool]]:
        """(role, value, whether looked up) of every field; of one that holds several, each."""
        for one in fields(self):
            value, how = getattr(self, one.name), one.metadata == LOOKED_UP
            if isinstance(value, Mapping):
                yield from ((f"{one.name}.{key}", item, how) for key, item in value.items())
            elif isinstance(value, tuple) and any(isinstance(item, Stage | Source) for item in value):
                names = (item.name if isinstance(item, Stage) else item.field for item in value)
                yield from ((f"{one.name}.{name}", item, how) for name, item in zip(names, value, strict=True))
            elif value is not None and value != () and one.name != "name":
                yield one.name, value, how

    @cached_property
    def parents(self) -> dict[str, "Stage"]:
        """The stages that it is made from, by role."""
        return {role: value for role, value, _ in self._flat() if isinstance(value, Stage)}

    @cached_property
    def sources(self) -> dict[str, Source]:
        """The outside files, by the config's field."""
        return {value.field: value for _, value, _ in self._flat() if isinstance(value, Source)}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All content, as JSON says it."""
        plain = (Stage, Source, Resources, Limit)
        return {role: _content(value) for role, value, _ in self._flat() if not isinstance(value, plain)}

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Of every outside file, by the config's field; None where this machine sees none."""
        return {name: source.fingerprint() for name, source in self.sources.items()}

    @cached_property
    def digest(self) -> str:
        """12 hex digits over everything that decides the content."""
        parents = {r: s.rule if how else s.digest for r, s, how in self._flat() if isinstance(s, Stage)}
        return digest_of({**self._code, "parents": parents, "sources": self.fingerprints})

    @cached_property
    def rule(self) -> str:
        """As `digest`, over what decides how a row is made, whatever rows there are."""
        return digest_of({**self._code, "parents": {role: parent.rule for role, parent in self.parents.items()}})

    @property
    def _code(self) -> dict[str, Any]:
        return {"instance": self.instance, "class": type(self).__name__, "version": self.version, "settings": self.settings}

    def output(self, root: str) -> Output:
        """Where this instance's output lives."""
        return output_of(root, self.instance, self.digest)

    @cached_property
    def pretrained(self) -> dict[str, Pretrained | Weights]:
        """All pretrained models that it loads, by the config's field of their weights.

        Who takes a trained model loads what that is built on too.
        """
        sections = ((self.config_field(role), value) for role, value, _ in self._flat() if isinstance(value, BaseModel))
        own = {field: model for place, section in sections for field, model in models_in(section, place)}
        built = (item for parent in self.parents.values() if parent.model for item in parent.pretrained.items())
        return {**dict(built), **own}

    @property
    def weights(self) -> dict[str, Weights]:
        """Those of `pretrained` that are not the library's own."""
        found = {field: model if isinstance(model, Weights) else model.source[1] for field, model in self.pretrained.items()}
        return {field: weights for field, weights in found.items() if weights is not None}

    def missing(self) -> dict[str, str]:
        """The outside files that this machine does not see: the config's field -> what was found and what to do."""
        return {name: source.problem() for name, source in self.sources.items() if self.fingerprints[name] is None}

    def check(self) -> dict[str, str]:
        """What is wrong before any work: the config's field -> what was found and what to do.

        Missing sources; a class adds what else its work would stumble over. Pretrained models are checked once a run.
        """
        secrets = {source.field: source.secret() for source in self.sources.values()}
        return self.missing() | {field: problem for field, problem in secrets.items() if problem is not None}

    def recall(self, root: str, digest: str) -> None:
        """Stand for an output that other code or other files made: it has this digest, its ancestors those of the manifests."""
        self.__dict__["digest"] = digest
        manifest = self.output(root).manifest()
        made = manifest["parents"] if manifest else {}
        for role, parent in self.parents.items():
            if role in made and parent.digest != made[role]["digest"]:
                parent.recall(root, made[role]["digest"])

    def earlier(self, root: str) -> tuple[Output, Manifest] | None:
        """The newest whole output of the same instance, code and settings but of other parents, and its manifest."""
        own, system = self.output(root), filesystem(root)[0]
        wanted = json.loads(json.dumps({name: getattr(self, name) for name in ("instance", "version", "settings")}))
        found = []
        for output in outputs_of(root, self.kind):
            with suppress(UserError):  # a damaged manifest, that nobody asked for, is none
                manifest = output.manifest() if output != own else None
                if manifest is not None and all(manifest.get(name) == value for name, value in wanted.items()):
                    found.append((system.get_file_info(output.path(MANIFEST)).mtime_ns, output, manifest))
        newest = sorted(found, key=lambda entry: entry[0], reverse=True)
        return next(((output, manifest) for _, output, manifest in newest if not differences(output, manifest)), None)

    def run(self, root: str, monitor: Monitor, groups: "Groups | None" = None) -> Manifest:
        """Do the work unless a manifest shows it done. Returns the manifest.

        Raises UserError when a parent is not as it was made, and when more rows were rejected than allowed; what was done
        stays for a later run.
        """
        found = run_together({self: monitor}, root, groups)[self]
        if isinstance(found, UserError):
            raise found
        return found

    def _finish(self, root: str, seconds: float, startup: float) -> Manifest:
        output = self.output(root)
        output.sweep()
        manifest = self._describe(output, seconds, startup)
        self._check_rejects(manifest, output)
        output.write_json(MANIFEST, manifest)
        return manifest

    def _describe(self, output: Output, seconds: float, startup: float) -> Manifest:
        parts, files = described(output)
        said: Manifest = {
            "instance": self.instance,
            "digest": self.digest,
            "version": self.version,
            "settings": self.settings,
            "parents": {role: {"instance": p.instance, "digest": p.digest} for role, p in self.parents.items()},
            "sources": {name: digest_of(found) for name, found in self.fingerprints.items()},
            "rows": sum(part["rows"] for part in parts.values()),
            "rejects": dict(Counter(output.rejects()["reason"].to_pylist())),
            "seconds": round(seconds, 1),
            "startup_seconds": round(startup, 1),
            "code": code(),
            "environment": [output.read_json(f"{ENVIRONMENT}/{name}") for name in output.names(ENVIRONMENT)],
            "parts": parts,
            "files": files,
        }
        if warnings := read_warnings(output):
            said["warnings"] = warnings
        if output.exists(REUSED):
            said["reused"] = output.read_json(REUSED)
        return sealed(said)

    def _check_rejects(self, manifest: Manifest, output: Output) -> None:
        rejected = sum(manifest["rejects"].values())
        total = rejected + manifest["rows"]
        if rejected > self.reject_limit * total:
            example = output.rejects().slice(0, 1).to_pylist()[0]
            raise UserError(
                f"{self.instance}: {rejected} of {total} rows were rejected ({manifest['rejects']}), more than "
                f"max_reject_fraction={self.reject_limit:g} allows; the first: {example['key']}: {example['reason']} "
                f"({example['detail']}). All are in {output.path('rejects')}"
            )


def run_together(
    stages: Mapping[Stage, Monitor], root: str, groups: "Groups | None" = None
) -> dict[Stage, Manifest | UserError]:
    """As `Stage.run`, of stages that join one another, in one piece of work.

    Returns the manifest of each, or what is wrong with its rows. The time is shared out: a stage has the seconds from the last
    unit of the one before it to its own last, the last one those until all is done.
    """
    found: dict[Stage, Manifest | UserError] = {}
    clocks: dict[Stage, _Clock] = {}
    for stage in stages:
        if (done := stage.output(root).manifest()) is not None:
            found[stage] = done
        else:
            verify(parent.output(root) for parent in stage.parents.values())
            remove_broken(stage.output(root))
            clocks[stage] = _Clock()
    runs = {stage: RunContext(root, Several(stages[stage], clock), groups) for stage, clock in clocks.items()}
    if runs:
        next(iter(runs)).work_together([(stage, stage.output(root), run) for stage, run in runs.items()])
    began = min((clock.began for clock in clocks.values()), default=0.0)
    for place, (stage, clock) in enumerate(clocks.items(), 1):
        ended = time.monotonic() if place == len(clocks) else clock.last
        try:
            found[stage] = stage._finish(root, ended - began, clock.startup(began))
        except UserError as error:
            found[stage] = error
        began = ended
    return found


class _Clock(Monitor):
    """When work on the first unit began, and when the last was finished."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.first = math.inf

    def advance(self, count: int, seconds: float = 0.0) -> None:
        """A unit more."""
        self.last = time.monotonic()
        self.first = min(self.first, self.last - seconds)

    def startup(self, began: float) -> float:
        """Seconds until a process began to work; without any unit none."""
        return max(self.first - began, 0.0) if self.first < math.inf else 0.0


def _content(value: Any) -> Any:
    """A field's value as a digest takes it. TypeError for what JSON cannot say: a field that nobody knows how to compare."""
    if isinstance(value, BaseModel):
        return content_of(value)
    return json.loads(json.dumps(value))
