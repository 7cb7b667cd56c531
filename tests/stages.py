"""What a test has at hand, as the parents of a stage; `stages.py` of each package makes that package's stages."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from cluster.app.graph import FLOW
from cluster.artifacts import Output
from cluster.monitor import Monitor
from cluster.stage import RunContext, Source, Stage
from mining.config import TowerConfig, ViewsConfig
from mining.embeddings import MEAN, plain_parts, read_part
from mining.features import Features, Online
from vdg.images import Images, ImageSource


@dataclass(frozen=True, eq=False, kw_only=True)
class Given(Stage):
    """A finished stage whose output a test has made."""

    made: str  # its URI
    tower: TowerConfig | None = None
    views: ViewsConfig | None = None

    def output(self, root: str) -> Output:
        return Output(self.made)

    def work(self, output: Output, run: RunContext) -> None:
        raise AssertionError("it is made")


def given(output: Output, **fields: Any) -> Given:
    return Given(name=output.uri.rpartition("/")[2], made=output.uri, **fields)


def maybe(output: Output | None) -> Given | None:
    return None if output is None else given(output)


def running(monitor: Monitor | None = None) -> RunContext:
    return RunContext("no root", monitor or Monitor())


def seen(images: ImageSource) -> dict[str, tuple[Stage, ...]]:
    """The fields of a stage that sees these images."""
    if isinstance(images, Images):
        return {"embeddings": (), "galleries": tuple(map(given, images.galleries))}
    assert isinstance(images, Features)
    online = images.online
    how = {"tower": online.tower, "views": online.views} if online else {}
    embeddings = tuple(given(output, **how) for output in (images.embeddings, *images.more))
    return {"embeddings": embeddings, "galleries": tuple(map(given, online.galleries)) if online else ()}


def centred_by_own(embeddings: Output, online: Online | None = None) -> Features:
    """Features that are centred by the mean of their own plain view, which lies beside them."""
    if not embeddings.exists(MEAN):
        total, count = np.float64(0.0), 0
        for part in plain_parts(embeddings):  # one at a time: galleries of benchmarks are large
            values = read_part(embeddings, part)[1].mean(axis=1, dtype=np.float64)
            total, count = total + values.sum(axis=0), count + len(values)
        embeddings.write_bytes(MEAN, save({"mean": (total / count).astype(np.float32)}))
    return Features(embeddings, online, center=embeddings)


def center_of(features: Features) -> Given:
    assert features.center is not None
    return given(features.center)


def simple(
    instance: str,
    version: int = 1,
    settings: Mapping[str, Any] | None = None,
    work: Callable[[Output, Monitor], None] | None = None,
    parents: Mapping[str, Stage] | None = None,
    sources: Mapping[str, str] | None = None,
    max_reject_fraction: float = 0.0,
) -> Stage:
    """A stage that a test states whole, of any kind; what MLflow calls its output is as of the real ones of that kind."""
    kind, _, name = instance.partition(":")
    real = next((stage for stage in FLOW if stage.kind == kind), None)

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Simple(Stage, kind=kind):
        table = real.table if real else None
        model = real.model if real else None

        @property
        def reject_limit(self) -> float:
            return max_reject_fraction

        def _flat(self) -> Iterator[tuple[str, Any, bool]]:
            yield from ((role, value, False) for role, value in (settings or {}).items())
            yield from ((role, parent, False) for role, parent in (parents or {}).items())
            yield from ((field, Source(field, path), False) for field, path in (sources or {}).items())

        def work(self, output: Output, run: RunContext) -> None:
            if work is not None:
                work(output, run.monitor)

    Simple.version = version
    return Simple(name=name)
