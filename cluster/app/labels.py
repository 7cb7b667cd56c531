"""People's judgements: of generated deltas and of search results, which pairs they see, and where their answers are kept."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cir.select import share_beaten
from cluster.app.api import Run
from cluster.artifacts import Output, below
from cluster.config import Section
from cluster.errors import UserError
from cluster.manifest import checked
from mining import tables

DISAGREEING = 0.3  # share of the pairs that the queue draws from: those whose scores disagree most
UNIFORM_EVERY = 10  # one in so many is drawn from all pairs: what these say of the generator holds for all
Verdict = Literal["right", "edited", "no_change", "wrong", "skip", "undone"]


class Label(TypedDict):
    """A judgement as it is kept: of what, what was said, who said it when, and of which output."""

    label_id: str
    triplet_id: int
    reference_id: int
    target_id: int
    text: str
    verdict: Verdict
    reason: Literal["disagreement", "uniform", "search"]
    author: str
    time: float
    digest: str


_LABEL = TypeAdapter(Label)


class Judged(Section):
    """What a person said of a pair. `label_id` is made by the client: the same one again changes nothing."""

    label_id: str = Field(pattern="^[0-9a-f-]{16,64}$")
    triplet_id: int = Field(ge=0, lt=2**63)
    verdict: Verdict
    text: str = Field("", max_length=512)
    reason: Literal["disagreement", "uniform"]


class Found(Section):
    """A search result that a person calls right: the text leads from the reference to it."""

    label_id: str = Field(pattern="^[0-9a-f-]{16,64}$")
    reference_id: int = Field(ge=0, lt=2**63)
    target_id: int = Field(ge=0, lt=2**63)
    text: str = Field(min_length=1, max_length=512)
    verdict: Literal["right", "undone"] = "right"


class Store:
    """The labels of a run, a file each, to which others are only added. Processes, on any machines, may share it."""

    def __init__(self, run: Run) -> None:
        config = run.graph.config
        self.folder = Output(below(config.root, f"labels/{config.name}"))
        self._known: dict[str, Label] = {}  # by file name; a file that is there never changes
        self._lock = Lock()

    def add(self, label: dict[str, Any], author: str, digest: str) -> Label:
        """Keep a label; what is kept under its id, where that is there already. Stored when it returns."""
        name = f"{label['label_id']}.json"
        with self._lock:
            if name not in self._read():
                made = cast(Label, label | {"author": author, "time": time.time(), "digest": digest})
                self.folder.write_json(name, made)
                self._known[name] = made
            return self._known[name]

    def __iter__(self) -> Iterator[Label]:
        """Every label, in the order of their coming. Raises UserError naming a file that is none."""
        with self._lock:
            labels = list(self._read().values())
        return iter(sorted(labels, key=lambda label: (label["time"], label["label_id"])))

    def _read(self) -> dict[str, Label]:
        if new := [name for name in self.folder.names() if name not in self._known]:
            with ThreadPoolExecutor(16) as pool:
                self._known |= zip(new, pool.map(self._kept, new), strict=True)
        return self._known

    def _kept(self, name: str) -> Label:
        try:
            return cast(Label, checked(_LABEL, json.loads(self.folder.read_bytes(name))))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.folder.path(name)}: is no label ({error}); mend it, or remove this file") from error

    def last(self, digest: str | None = None) -> dict[int, Label]:
        """The last label of each triplet (of one output's), without those that were undone."""
        found = {label["triplet_id"]: label for label in self if digest in (None, label["digest"])}
        return {triplet: label for triplet, label in found.items() if label["verdict"] != "undone"}


@dataclass(frozen=True)
class Precision:
    """Share of deltas that are right as they are, with its 95 % interval (Wilson)."""

    judged: int
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.0%} of the generator's deltas are right ({self.low:.0%} to {self.high:.0%}, of {self.judged})"


def precision(labels: Iterable[Label]) -> Precision | None:
    """Of the deltas of uniformly drawn pairs; skipped ones say nothing. None before the first judgement."""
    verdicts = [label["verdict"] for label in labels if label["verdict"] != "skip"]
    if not verdicts:
        return None
    n, p, z = len(verdicts), verdicts.count("right") / len(verdicts), 1.96
    middle, spread = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Precision(n, p, (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n))


class Labelling:
    """The pseudo triplets of a run as people judge them."""

    def __init__(self, run: Run, seed: int = 0) -> None:
        """Raises UserError when the run has no pseudo triplets."""
        stage = run.pseudo_triplets
        if stage is None:
            raise UserError(f"{run.graph.config.name}: has no pseudo triplets to judge; give a variant pseudo: true")
        self.run, self.digest, self.seed, made = run, stage.digest, seed, run.graph.output(stage)
        self.gallery = run.graph.output(run.graph[f"ingest:{run.graph.config.mine.gallery}"])
        self.rows = {row["triplet_id"]: row for row in made.read_parts(tables.TRIPLETS).to_pylist()}
        self.images = {row[role] for row in self.rows.values() for role in ("reference_id", "target_id")}
        self.store = Store(run)
        # all pairs in an order that the seed alone decides: the first ones are a uniform sample
        self.order: list[int] = np.random.default_rng(seed).permutation(sorted(self.rows)).tolist()

    @cached_property
    def apart(self) -> dict[int, float]:
        """How far a triplet's scores rank it apart, 0 to 1; the same for all where there is one score."""
        scores = self.run.scores()
        ranks: dict[str, dict[int, float]] = {}
        for scorer in sorted({row["scorer"] for row in scores}):
            rows = [row for row in scores if row["scorer"] == scorer and row["triplet_id"] in self.rows]
            places = share_beaten(np.array([row["value"] for row in rows]))
            ranks[scorer] = dict(zip((row["triplet_id"] for row in rows), places.tolist(), strict=True))
        return {t: float(np.ptp([rank[t] for rank in ranks.values() if t in rank] or [0.0])) for t in self.rows}

    @cached_property
    def disputed(self) -> list[int]:
        """The triplets whose scores disagree most; of those that disagree alike some at random."""
        count = max(1, round(DISAGREEING * len(self.rows)))
        return sorted(self.order, key=lambda triplet: -self.apart[triplet])[:count]

    def queue(self, count: int) -> list[tuple[int, str]]:
        """(triplet, why it was drawn) of the next pairs to judge: the same until one of them is judged.

        One in `UNIFORM_EVERY` is of the sample that measures the generator; the others are drawn at random from the disputed.
        """
        labelled, chosen = self.labels(), dict[int, str]()
        rng = np.random.default_rng([self.seed, len(labelled)])
        disputed = iter(rng.permutation([triplet for triplet in self.disputed if triplet not in labelled]).tolist())
        for place in range(len(labelled) + 1, len(labelled) + 1 + count):
            first = next((triplet for triplet in self.order if triplet not in labelled and triplet not in chosen), None)
            if first is None:
                break
            sampled = place % UNIFORM_EVERY == 0 and first in self._sample(place)
            drawn = first if sampled else next((triplet for triplet in disputed if triplet not in chosen), first)
            chosen[drawn] = "uniform" if drawn == first else "disagreement"
        return list(chosen.items())

    def _sample(self, judged: int) -> list[int]:
        """The uniform sample when so many pairs are judged: its size says nothing of what is in it.

        One that was judged before, for its disagreement, counts: to leave it out would leave out the disputed.
        """
        return self.order[: judged // UNIFORM_EVERY]

    def labels(self) -> dict[int, Label]:
        """Those of this run's pseudo triplets that count."""
        return self.store.last(self.digest)

    def precision(self) -> Precision | None:
        """The generator's, of the uniform sample."""
        labelled = self.labels()
        return precision(labelled[triplet] for triplet in self._sample(len(labelled)) if triplet in labelled)

    def judge(self, judged: Judged, author: str) -> Label:
        """Keep a label. Raises KeyError for an unknown triplet, UserError for an edit without a text."""
        row = self.rows[judged.triplet_id]
        if judged.verdict == "edited" and not judged.text.strip():
            raise UserError("text: an edited delta needs one")
        if judged.verdict == "right" and judged.text not in row["deltas"]:
            raise UserError("text: is none of the deltas that were shown; send it as edited")
        images = {role: row[role] for role in ("reference_id", "target_id")}
        return self.store.add(judged.model_dump() | images, author, self.digest)


class Teaching:
    """Search results that people call right."""

    def __init__(self, run: Run) -> None:
        self.run, self.store = run, Store(run)
        self.digest = run.graph.evaluation.parents["gallery"].digest

    def judge(self, found: Found, author: str) -> Label:
        """Keep a label. Raises KeyError for an image that is not in the gallery, UserError for one that leads to itself."""
        self.run.searcher.keys(np.array([found.reference_id, found.target_id]))
        if found.reference_id == found.target_id:
            raise UserError("target_id: is the reference itself")
        if not found.text.strip():
            raise UserError("text: is empty")
        triplet_id = tables.stable_id("found", found.reference_id, found.target_id, found.text)
        return self.store.add(found.model_dump() | {"triplet_id": triplet_id, "reason": "search"}, author, self.digest)


@dataclass(frozen=True)
class Frozen:
    """A file of labelled triplets over one gallery."""

    gallery: str
    file: str
    rows: int
    authors: dict[str, int]


def freeze(run: Run) -> list[Frozen]:
    """The right and the edited labels as files of labelled triplets, named by their content, one for each gallery.

    A label goes to the first gallery that holds both its images, by their bytes: that of the labelled triplets, that of the
    mined pairs, the one that is searched. Labels of the run's earlier outputs count too. Raises UserError when there are none.
    """
    config = run.graph.config
    names = dict.fromkeys([config.ingest.triplets[config.train.triplets].gallery, config.mine.gallery, "evaluate"])
    instances = {stage.instance: stage for stage in run.graph.stages}
    hashes: dict[int, str] = {}  # of the bytes of every image
    keys: dict[str, dict[str, str]] = {}  # gallery -> what its images are called, by hash
    for name in (name for name in names if f"ingest:{name}" in instances):
        gallery = run.graph.output(instances[f"ingest:{name}"])
        table = gallery.read_parts(tables.GALLERY, ["image_id", "key", "sha256"]).to_pydict()
        hashes |= zip(table["image_id"], table["sha256"], strict=True)
        keys[name] = dict(zip(table["sha256"], table["key"], strict=True))
    rows: dict[str, list[dict[str, Any]]] = {}
    for _, label in sorted(Store(run).last().items()):
        images = [hashes.get(label["reference_id"]), hashes.get(label["target_id"])]
        holder = next((name for name, known in keys.items() if set(images) <= known.keys()), None)
        if holder is not None and label["verdict"] in ("right", "edited"):
            reference, target = (keys[holder][image or ""] for image in images)
            row = {"reference": reference, "target": target, "captions": [label["text"]], "author": label["author"]}
            rows.setdefault(holder, []).append(row)
    if not rows:
        raise UserError(
            f"{Store(run).folder.uri}: no delta or result of this run was judged right; `vdg serve` has a tab for it"
        )
    return [_write(run, gallery, found) for gallery, found in rows.items()]


def _write(run: Run, gallery: str, rows: list[dict[str, Any]]) -> Frozen:
    content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    config = run.graph.config
    name = f"{config.name}-{gallery}-{hashlib.sha256(content).hexdigest()[:12]}.json"
    Output(below(config.root, "labels")).write_bytes(name, content)
    authors = Counter(row["author"] for row in rows)
    return Frozen(gallery, below(config.root, f"labels/{name}"), len(rows), dict(authors))
