"""Config files: YAML sections checked by pydantic, with overrides from the command line."""

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError

from cluster.errors import UserError, shown

Seed = Annotated[int, Field(ge=0)]


def _each_once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"found {seeds}: what is counted twice tells nothing new; give each seed once")
    return seeds


Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_each_once)]
Beta = Annotated[float, Field(ge=0, lt=1)]
FOLDER = r"\w[\w-]{0,63}"  # a name that becomes a part of a folder's
CONTENT = "content"  # context of a dump that decides a digest
# `json_schema_extra` of a field: it never decides what comes out, it holds a path, or both
NOT_CONTENT: dict[str, Any] = {"content": False}
PATH: dict[str, Any] = {"path": True}
PARTIAL: dict[str, Any] = {"partial": True}  # it maps names to fields of the section that it is in


class Section(BaseModel):
    """A part of a config. Unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """As pydantic's, which makes an error of its own of a Ctrl-C that comes meanwhile."""
        try:
            return super().model_dump(**options)
        except PydanticSerializationError as error:
            if "KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from error
            raise

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        dumped: dict[str, Any] = dump(self)
        if info.context == CONTENT:
            for name, field in type(self).model_fields.items():
                if _says(field, NOT_CONTENT):
                    del dumped[name]
        return dumped


def _says(field: FieldInfo, mark: dict[str, Any]) -> bool:
    return isinstance(field.json_schema_extra, dict) and mark.items() <= field.json_schema_extra.items()


def path_field(description: str, default: Any = ..., **extra: Any) -> Any:
    """A field that holds a path, or several."""
    return Field(default, json_schema_extra={**PATH, **extra}, description=description)


def in_folder(model: type[BaseModel], content: Any, folder: Path) -> Any:
    """A file's content with its relative paths taken from a folder; `model` says which fields are paths."""
    if not isinstance(content, dict):
        return content
    placed = dict(content)
    for name, field in model.model_fields.items():
        if name not in content:
            continue
        kinds = (kind for kind in _kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
        section = next(kinds, None)
        section = model if _says(field, PARTIAL) else section
        value, several = content[name], get_origin(field.annotation) is dict
        if _says(field, PATH):
            placed[name] = _placed(value, folder)
        elif section is not None and several and isinstance(value, dict):
            placed[name] = {key: in_folder(section, item, folder) for key, item in value.items()}
        elif section is not None:
            placed[name] = in_folder(section, value, folder)
    return placed


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type, and those that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    if not isinstance(value, str) or "://" in value or value.startswith(("~", "{")):
        return value
    return str(folder / value)


def content_of(section: BaseModel) -> dict[str, Any]:
    """A section as a digest takes it: weights by their content, and without what decides nothing."""
    return section.model_dump(mode="json", context=CONTENT)


Process = dict[str, float]  # what it takes, as Ray names it


class Resources(Section):
    """What a stage may use. Never part of a digest: another cluster, the same outputs."""

    def processes(self) -> list[Process]:
        """What each of its processes takes."""
        raise NotImplementedError

    def wanted(self) -> Process:
        """CPUs and GPUs of all of them together."""
        return {name: sum(process.get(name, 0.0) for process in self.processes()) for name in ("CPU", "GPU")}

    def least(self) -> list[Process]:
        """Those that must be there at the same time, or the stage waits for ever: of a pool the others may come later."""
        return self.processes()[:1]


class TaskResources(Resources):
    """What one process of a stage may use."""

    cpus: float = Field(1.0, gt=0, description="CPUs a process; also its number of threads, rounded up")
    gpus: float = Field(0.0, ge=0, description="GPUs a process")
    memory_gb: float | None = Field(None, gt=0, description="memory a process, for Ray's placement")
    accelerator_type: str | None = Field(None, description="as Ray names it: A100, H100, L4")

    def processes(self) -> list[Process]:
        """One."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory_gb or 0) * 2**30}
        return [wanted | ({f"accelerator_type:{self.accelerator_type}": 0.001} if self.accelerator_type else {})]

    def ray_options(self) -> dict[str, Any]:
        """As Ray's tasks, actors and `map_batches` take them."""
        memory = int(self.memory_gb * 2**30) if self.memory_gb else None
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": memory, "accelerator_type": self.accelerator_type}


class ActorResources(TaskResources):
    """What a stage with a pool of model actors may use."""

    actors: int = Field(1, ge=1, description="model actors")

    def processes(self) -> list[Process]:
        """The actors."""
        return self.actors * TaskResources.processes(self)


class DecodeResources(Resources):
    """What a stage that decodes images may use."""

    decode_cpus: float = Field(1.0, gt=0, description="CPUs a decode task")
    decode_tasks: int = Field(1, ge=1, description="decode tasks at a time, over the whole cluster")

    def processes(self) -> list[Process]:
        """The decode tasks."""
        return self.decode_tasks * [{"CPU": self.decode_cpus}]


class EmbedResources(ActorResources, DecodeResources):
    """What embed may use: CPU tasks that decode feed a pool of actors that hold the tower, or these decode for themselves."""

    decode_tasks: int = Field(1, ge=0, description="decode tasks at a time, over the whole cluster; 0: the actors decode")
    batch_size: int = Field(64, gt=0, description="images a forward pass")

    def processes(self) -> list[Process]:
        """The actors, then the decode tasks."""
        return ActorResources.processes(self) + DecodeResources.processes(self)

    def least(self) -> list[Process]:
        """All actors, which never let go of their CPUs, and a task that feeds them, if any."""
        return self.processes()[: self.actors + 1]


class WorkerResources(TaskResources):
    """What a training run may use. `workers: 0` trains in the driver's process."""

    workers: int = Field(1, ge=0, description="data-parallel training processes")
    max_failures: int = Field(2, ge=0, description="times Ray Train restarts a failed worker group")
    on_changed_world: Literal["error", "weights"] = Field(
        "error", description="resume with another number of workers: refuse, or go on from the weights alone"
    )

    def processes(self) -> list[Process]:
        """The workers."""
        return self.workers * super().processes()

    def wanted(self) -> Process:
        """In the driver all threads that the machine has."""
        return super().wanted() if self.workers else {"CPU": math.inf, "GPU": 0.0}

    def least(self) -> list[Process]:
        """All workers, which start together."""
        return self.processes()


class TrainingConfig(Section):
    """How a model is trained. The global batch is stated; the micro-batch follows from the workers unless given."""

    steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(gt=0, description="global batch, over all workers")
    micro_batch: int | None = Field(None, gt=0, description="rows a worker and forward pass; None: no accumulation")
    learning_rate: float = Field(gt=0, description="of AdamW, after the warm-up")
    learning_rates: dict[str, float] = Field({}, description="other rates, by prefix of the parameter's name")
    schedule: Literal["constant", "cosine", "tenth_after_half"] = Field(
        "cosine", description="of the learning rate: constant, a cosine down to 0, or a tenth from half of the steps on"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises linearly")
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="of AdamW")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW")
    gradient_clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: any")
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="auto: bf16 where the processor is fast at it")
    zero_stage: Literal[1, 2, 3] = Field(2, description="what workers share out: 1 optimizer, 2 gradients too, 3 weights too")
    checkpoint_every: int | None = Field(None, gt=0, description="steps between validated checkpoints; None: at the end")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self

    def accumulation(self, world: int) -> tuple[int, int]:
        """(micro-batch, accumulation steps) for a number of workers. Raises UserError when they do not divide."""
        micro = self.micro_batch or self.batch_size // world
        steps, rest = divmod(self.batch_size, max(micro, 1) * world)
        if rest or not micro:
            raise UserError(f"batch_size {self.batch_size} is no multiple of {world} worker(s) x micro_batch {micro}")
        return micro, steps


SectionT = TypeVar("SectionT", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping. Raises UserError naming the file when it cannot be read or is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: of a name with a NUL
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({why}); give an existing file or a preset's name") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str | bytes, where: str) -> dict[str, Any]:
    """The YAML mapping that a text says. Raises UserError that begins with `where` when it says none."""
    content = _parse(text, f"{where}: is not valid YAML")
    if not isinstance(content, dict):
        raise UserError(f"{where}: found {type(content).__name__}, expected sections such as 'ingest:' and 'train:'")
    return content


class _Loader(yaml.SafeLoader):
    """Plain values, and each key once: of two the last would silently win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As it is written, before what it merges joins its keys. Raises ConstructorError when a key comes twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _MERGE and isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} comes twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return node


_MERGE = "tag:yaml.org,2002:merge"
LARGEST = 100_000  # values of a config: a few aliases of aliases in a small file stand for billions


def _parse(text: str | bytes, wrong: str) -> Any:
    """The value of a YAML text. Raises UserError that begins with `wrong`."""
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
        if bad := _unfit(content):
            raise ValueError(bad)
    except RecursionError as error:
        raise UserError(f"{wrong}: it is nested too deeply, or holds itself") from error
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{wrong}: {shown(str(error))}") from error  # dates, numbers and tags raise what they like
    return content


def _unfit(node: Any) -> str | None:
    """What of a config no section can hold, and would not survive being written again."""
    nodes = [node]
    for _ in range(LARGEST):
        if not nodes:
            return None
        node = nodes.pop()
        if isinstance(node, dict):
            nodes += [*node, *node.values()]
        elif isinstance(node, list):
            nodes += node
        if bad := _unfit_value(node):
            return bad
    return f"it stands for more than {LARGEST:,} values, or holds itself"


def _unfit_value(node: Any) -> str | None:
    if isinstance(node, dict):
        return next((f"the key {key!r} is no text" for key in node if not isinstance(key, str)), None)
    if isinstance(node, str):
        return f"{shown(node[:80])!r} holds a NUL, or is not UTF-8" if "\0" in node or shown(node) != node else None
    if isinstance(node, int) and abs(node) >= 2**63:
        return "a whole number has more than 63 bits"
    known = node is None or isinstance(node, bool | int | float | list)
    return None if known else f"{node!s:.80} is read as {type(node).__name__}; put it in quotes"


def override(content: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `section.field=value` assignments (values in YAML) to a copy of a config's content."""
    result = copy.deepcopy(content)
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not all(name.split(".")) or _unfit(name):
            raise UserError(f"--set {shown(assignment)[:200]}: expected section.field=value")
        *sections, field = name.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {assignment}: '{section}' is a value, not a section")
        node[field] = _parse(value, f"--set {shown(assignment[:200])}: the value is not valid YAML")
    return result


def _found(value: Any) -> str:
    try:
        return shown(str(value)[:80])
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return type(value).__name__


def validate(model: type[SectionT], content: dict[str, Any], where: str) -> SectionT:
    """Check a config's content. Raises UserError with one line for each wrong field: its name, what was found, why."""
    try:
        return model.model_validate(content)
    except RecursionError as error:
        raise UserError(f"{where}: it is nested too deeply, or holds itself") from error
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']} (found {_found(e['input'])!r})" for e in error.errors()
        ]
        raise UserError(f"{where}: {len(lines)} wrong field(s)\n" + "\n".join(lines)) from error
