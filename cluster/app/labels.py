"""People's judgements of generated deltas: which pairs they see, and where their answers are kept."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from pydantic import Field

from cluster.app.api import Run
from cluster.artifacts import filesystem
from cluster.config import Section, validate
from cluster.errors import UserError
from mining import tables

DISAGREEING = 0.3  # share of the pairs that the queue draws from: those whose scores disagree most
UNIFORM_EVERY = 10  # one in so many is drawn from all pairs: what these say of the generator holds for all
_log = logging.getLogger(__name__)
Verdict = Literal["right", "edited", "no_change", "wrong", "skip", "undone"]


class Judged(Section):
    """What a person said of a pair. `label_id` is made by the client: the same one again changes nothing."""

    label_id: str = Field(pattern="^[0-9a-f-]{16,64}$")
    triplet_id: int = Field(ge=0, lt=2**63)
    verdict: Verdict
    text: str = Field("", max_length=512)
    reason: Literal["disagreement", "uniform"]


class Kept(Judged):
    """As it is kept: who said it when, and of which output."""

    author: str
    time: float
    digest: str


class Store:
    """Labels as JSON lines, which are only ever appended. Processes on one machine may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_suffix(".lock"))

    def add(self, judged: Judged, author: str, digest: str) -> dict[str, Any]:
        """Keep a label; what is kept under its id, where that is there already. On disk when it returns."""
        with self._lock:
            for label in self:
                if label["label_id"] == judged.label_id:
                    return label
            label = judged.model_dump() | {"author": author, "time": round(time.time(), 3), "digest": digest}
            half = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
            with self.path.open("a") as file:
                file.write("\n" * half + json.dumps(label, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return label

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every label, in the order of their coming; half a line of a process that was killed is left out.

        Raises UserError naming a line that is no label.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        for number, line in enumerate(lines, 1):  # `splitlines` would cut texts too, at U+2028 and the like
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                _log.warning("%s: line %d is half a label, and left out", self.path, number)
                continue
            yield validate(Kept, content, f"{self.path}: line {number}").model_dump()

    def last(self, digest: str) -> dict[int, dict[str, Any]]:
        """The last label of each triplet of one output, without those that were undone."""
        found = {label["triplet_id"]: label for label in self if label["digest"] == digest}
        return {triplet: label for triplet, label in found.items() if label["verdict"] != "undone"}


@dataclass(frozen=True)
class Precision:
    """Share of deltas that are right as they are, with its 95 % interval (Wilson), from the uniformly drawn pairs."""

    judged: int
    share: float
    low: float
    high: float


def precision(labels: list[dict[str, Any]]) -> Precision | None:
    """None before the first judgement."""
    judged = [label for label in labels if label["reason"] == "uniform" and label["verdict"] != "skip"]
    if not judged:
        return None
    n, p, z = len(judged), float(np.mean([label["verdict"] == "right" for label in judged])), 1.96
    middle, spread = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Precision(n, p, (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n))


class Labelling:
    """The pseudo triplets of a run as people judge them."""

    def __init__(self, run: Run) -> None:
        """Raises UserError when labels cannot be kept beside the run."""
        config = run.graph.config
        if "://" in config.root:
            raise UserError(f"root: labels are kept on a local disk, {config.root} is none")
        self.run, stage = run, run.graph[f"generate:{config.mine.gallery}"]
        self.digest = stage.digest
        made = run.graph.output(stage)
        self.gallery = run.graph.output(run.graph[f"ingest:{config.mine.gallery}"])
        self.rows = {row["triplet_id"]: row for row in made.read_parts(tables.TRIPLETS).to_pylist()}
        self.images = {row[role] for row in self.rows.values() for role in ("reference_id", "target_id")}
        scores = [made.read_table(f"scores/{name}", tables.SCORES).to_pylist() for name in made.names("scores")]
        self._scores = [row for part in scores for row in part]
        self.store = Store(Path(filesystem(config.root)[1]) / "labels" / f"{config.name}.jsonl")

    def disagreement(self) -> dict[int, float]:
        """How far a triplet's scores rank it apart, 0 to 1; the same for all where there is one score."""
        ranks: dict[str, dict[int, float]] = {}
        for scorer in sorted({row["scorer"] for row in self._scores}):
            rows = [row for row in self._scores if row["scorer"] == scorer and row["triplet_id"] in self.rows]
            places = np.argsort(np.argsort([row["value"] for row in rows])) / max(len(rows) - 1, 1)
            ranks[scorer] = dict(zip((row["triplet_id"] for row in rows), places.tolist(), strict=True))
        return {t: float(np.ptp([rank[t] for rank in ranks.values() if t in rank] or [0.0])) for t in self.rows}

    def queue(self, count: int) -> list[tuple[int, str]]:
        """(triplet, why it was drawn) of the next pairs to judge: the same until one of them is judged."""
        labelled = self.store.last(self.digest)
        waiting = np.array([t for t in self.rows if t not in labelled], np.int64)
        apart = self.disagreement()
        scores = np.array([apart[t] for t in waiting.tolist()])
        rng = np.random.default_rng(len(labelled))
        far = waiting[np.argsort(-scores, kind="stable")[: max(1, round(DISAGREEING * len(waiting)))]]
        chosen: dict[int, str] = {}
        for place in range(len(labelled), len(labelled) + min(count, len(far))):
            uniform = place % UNIFORM_EVERY == UNIFORM_EVERY - 1
            free = [t for t in (waiting if uniform else far).tolist() if t not in chosen]
            if free:
                chosen[free[int(rng.integers(len(free)))]] = "uniform" if uniform else "disagreement"
        return list(chosen.items())

    def judge(self, judged: Judged, author: str) -> dict[str, Any]:
        """Keep a label. Raises KeyError for an unknown triplet, UserError for an edit without a text."""
        deltas = self.rows[judged.triplet_id]["deltas"]
        if judged.verdict == "edited" and not judged.text.strip():
            raise UserError("text: an edited delta needs one")
        if judged.verdict == "right" and judged.text not in deltas:
            raise UserError("text: is none of the deltas that were shown; send it as edited")
        return self.store.add(judged, author, self.digest)

    def freeze(self) -> Path:
        """The right and the edited ones as a file of labelled triplets, named by its content.

        Raises UserError when there are none.
        """
        from mining.gallery import keys

        names = {image_id: key for key, image_id in keys(self.gallery).items()}
        rows = [
            {
                "reference": names[self.rows[triplet]["reference_id"]],
                "target": names[self.rows[triplet]["target_id"]],
                "captions": [label["text"]],
            }
            for triplet, label in sorted(self.store.last(self.digest).items())
            if label["verdict"] in ("right", "edited")
        ]
        if not rows:
            raise UserError(f"{self.store.path}: no delta of this run was judged right or edited; `vdg serve` has a tab for it")
        content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
        path = self.store.path.with_name(f"{self.store.path.stem}-{hashlib.sha256(content).hexdigest()[:12]}.json")
        path.write_bytes(content)
        return path
