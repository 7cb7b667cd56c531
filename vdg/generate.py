"""The stage generate: pairs to pseudo triplets, one pairs part to one part, on a pool of actors."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import WARNINGS, Output, read_warnings, reject_row
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.parts import run_actors
from cluster.stage import LOOKED_UP, RunContext, Stage
from cluster.training.loop import stable_seed
from mining import tables
from mining.deltas import are_garbled
from vdg.agreement import medoid
from vdg.config import GenerateConfig
from vdg.description import read_description
from vdg.images import ImageSource, images_of
from vdg.instruct import Instruct
from vdg.prompts import says_no_change

GARBLED = "garbled.json"  # numbers of deltas, of those that are garbled, and of the one that comes most often
FEW = 20  # deltas, of which nothing follows where they are all alike


@dataclass(frozen=True, eq=False, kw_only=True)
class Generate(Stage):
    """`generate:<gallery>`: a delta and its scores for every pair.

    Pairs whose delta is empty, or says no change if so asked, are rejected.
    """

    version = 5
    table = "pseudo_triplets"
    pairs: Stage
    vdg: Instruct
    embeddings: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of the pairs' images, where a tower sees them
    galleries: tuple[Stage, ...] = field(default=(), metadata=LOOKED_UP)  # of those images, where pixels are seen
    config: GenerateConfig
    seed: int
    resources: ActorResources

    @property
    def reject_limit(self) -> float:
        """As the config says."""
        return self.config.max_reject_fraction

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when the model is no trained generator, before an actor starts."""
        pairs, model = run.output(self.pairs), run.output(self.vdg)
        images = images_of(run, self.embeddings, self.galleries, None)
        read_description(model)
        images.check(tables.images_in(pairs, tables.PAIRS), f"mine: {pairs.uri}")
        job = Generation(output, images, pairs, model, self.config, self.seed)
        run_actors(PartGenerator, job, pairs.part_rows(), self.resources, run.monitor, "delta")
        _flag(output, read_warnings(model))


def _flag(output: Output, of_training: list[str]) -> None:
    """Count the deltas that a generator which learned little writes, and say so.

    Raises UserError when all of them are such, and the training of the generator was odd too.
    """
    deltas = [texts[0] for texts in output.read_parts(tables.TRIPLETS, ["deltas"])["deltas"].to_pylist()]
    garbled = list(compress(deltas, are_garbled(deltas)))
    often, count = Counter(deltas).most_common(1)[0] if deltas else ("", 0)
    output.write_json(GARBLED, {"deltas": len(deltas), "garbled": len(garbled), "most_frequent": count})
    said = []
    if garbled:
        said.append(f"{len(garbled)} of {len(deltas)} deltas are garbled or repeat themselves, such as {garbled[0][:80]!r}")
    if len(deltas) >= FEW and count > len(deltas) / 2:
        said.append(f"{count} of {len(deltas)} deltas are the same: {often[:80]!r}")
    output.write_json(WARNINGS, said)
    if of_training and len(deltas) >= FEW and len(deltas) in (len(garbled), count):
        raise UserError(f"generate: {said[-1]}; the generator has learned nothing: in its training {of_training[0]}")


@dataclass(frozen=True)
class Generation:
    """What an actor needs to turn a pairs part into a part of pseudo triplets."""

    output: Output
    images: ImageSource
    pairs: Output
    model: Output
    config: GenerateConfig
    seed: int


@dataclass(frozen=True)
class Delta:
    """A delta and what speaks for it: scorer to value."""

    text: str
    scores: Mapping[str, float]


class PartGenerator:
    """An actor that holds the generator and turns pairs parts into parts of pseudo triplets.

    Batches are fixed and each has a seed of its own, from (seed, part, batch): a part made again is the same.
    """

    def __init__(self, job: Generation, cpus: float) -> None:
        from cluster.devices import limit_threads
        from cluster.provenance import record_environment
        from vdg.backbones import load_generator

        limit_threads(cpus)
        self.job = job
        open_images = job.images.open if job.config.views else job.images.open_plain
        self.images = open_images(tables.images_in(job.pairs, tables.PAIRS))  # of all: a node's actors share one join
        self.generator, self.inputs = load_generator(job.model, job.config.precision)
        record_environment(job.output, job.config.precision)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Make and write the part that `row` names."""
        name = str(row["part"][0])
        pairs = self.job.pairs.read_table(name, tables.PAIRS)
        self._write(name, pairs.to_pylist(), list(self._deltas(name, pairs)))
        return {"part": [name], "rows": [len(pairs)]}

    def _deltas(self, name: str, pairs: pa.Table) -> Iterator[Delta]:
        size = self.job.config.batch_size
        for index, first in enumerate(range(0, len(pairs), size)):
            batch, seed = pairs.slice(first, size), [self.job.seed, tables.stable_id(name), index]
            if self.job.config.samples == 1:
                yield from self._decoded(batch, self.job.config, 0, stable_seed(*seed))
            else:
                yield from map(_best, zip(*self._candidates(batch, seed), strict=True))

    def _candidates(self, pairs: pa.Table, seed: list[int]) -> Iterator[list[Delta]]:
        """Each several deltas of every pair: the greedy one where the config is greedy, then the samples."""
        config = self.job.config
        if config.greedy:
            yield self._decoded(pairs, config, 0, 0)
        sampled = config.model_copy(update={"greedy": False})
        for sample in range(config.samples):
            view = sample % self.images.views if config.views else 0
            yield self._decoded(pairs, sampled, view, stable_seed(*seed, sample))

    def _decoded(self, pairs: pa.Table, config: GenerateConfig, view: int, seed: int) -> list[Delta]:
        """One delta of every pair, its images seen in one view."""
        views = np.full(len(pairs), view)
        references, targets = (self.images.take(pairs[name].to_numpy(), views) for name in ("reference_id", "target_id"))
        texts, scores = self.generator.generate(self.inputs.pairs(references, targets), config, seed)
        return [Delta(text, {tables.SCORER: score}) for text, score in zip(texts, scores, strict=True)]

    def _write(self, name: str, pairs: list[dict[str, Any]], deltas: list[Delta]) -> None:
        """Write rejects and scores, then the triplets: the part's own file says that all is there."""
        triplets, scores, rejects = [], [], []
        for pair, delta in zip(pairs, deltas, strict=True):
            unchanged = self.job.config.drop_no_change and says_no_change(delta.text)
            if reason := "empty_delta" if not delta.text else "no_change" if unchanged else None:
                rejects.append(reject_row("generate", str(pair["pair_id"]), reason, f"the generator wrote {delta.text!r}"))
                continue
            triplet_id = tables.stable_id("vdg", pair["pair_id"])
            carried = {name: pair[name] for name in ("pair_id", "group_id", "reference_id", "target_id")}
            triplets.append({"triplet_id": triplet_id, **carried, "deltas": [delta.text], "source": "vdg"})
            scores += [{"triplet_id": triplet_id, "scorer": s, "value": value} for s, value in delta.scores.items()]
        self.job.output.write_rejects(name, rejects)
        self.job.output.write_table(f"scores/{name}", pa.Table.from_pylist(scores, tables.SCORES), tables.SCORES)
        self.job.output.write_table(name, pa.Table.from_pylist(triplets, tables.TRIPLETS), tables.TRIPLETS)


def _best(candidates: tuple[Delta, ...]) -> Delta:
    """The delta that agrees best with the others of its pair, and how well."""
    place, agreement = medoid([delta.text for delta in candidates])
    return Delta(candidates[place].text, {**candidates[place].scores, tables.AGREEMENT: agreement})
