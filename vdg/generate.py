"""The stage generate: pairs to pseudo triplets, one pairs part to one part, on a pool of actors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.monitor import Monitor
from cluster.parts import run_parts
from cluster.training import stable_seed
from mining import tables
from mining.features import Features, read_mean
from vdg.config import GenerateConfig, read_description

GENERATE_VERSION = 1


@dataclass(frozen=True)
class Generation:
    """What an actor needs to turn a pairs part into a part of pseudo triplets."""

    output: Output
    embeddings: Output
    pairs: Output
    model: Output
    config: GenerateConfig
    seed: int


def generate(
    output: Output,
    embeddings: Output,
    pairs: Output,
    model: Output,
    config: GenerateConfig,
    seed: int,
    resources: ActorResources,
    monitor: Monitor,
) -> None:
    """Write a delta and its score for every pair; pairs whose delta is empty are rejected.

    Raises UserError when `model` holds no trained generator or its language model is missing, before an actor starts.
    """
    read_description(model).vdg.language_model.location()
    Features(embeddings).check(_image_ids(pairs), f"mine: {pairs.uri}")
    job = Generation(output, embeddings, pairs, model, config, seed)

    def dataset(names: list[str]) -> ray.data.Dataset:
        return ray.data.from_items([{"part": name} for name in names], override_num_blocks=len(names)).map_batches(
            PartGenerator,
            fn_constructor_args=(job, resources.cpus),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(resources.actors, len(names))),
            **resources.ray_options(),
        )

    run_parts(output, pairs.part_rows(), dataset, monitor, "delta")


class PartGenerator:
    """An actor that holds the generator and turns pairs parts into parts of pseudo triplets.

    Batches are fixed and each has a seed of its own, from (seed, part, batch): a part made again is the same.
    """

    def __init__(self, job: Generation, cpus: float) -> None:
        import torch

        from cluster.devices import device, limit_threads, uses_bf16
        from cluster.environment import record_environment
        from vdg.model import load_vdg

        limit_threads(cpus)
        self.job = job
        self.mean = read_mean(job.model)
        self.features = Features(job.embeddings).open_plain(_image_ids(job.pairs))
        dtype = torch.bfloat16 if uses_bf16(job.config.precision) else torch.float32
        self.generator = load_vdg(job.model, device(), dtype)
        record_environment(job.output, job.config.precision)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Make and write the part that `row` names."""
        name = str(row["part"][0])
        pairs = self.job.pairs.read_table(name, tables.PAIRS)
        deltas = list(self._deltas(name, pairs))
        triplets = [_triplet(pair, text) for pair, (text, _) in zip(pairs.to_pylist(), deltas, strict=True)]
        self._write(name, triplets, [score for _, score in deltas])
        return {"part": [name], "rows": [len(pairs)]}

    def _deltas(self, name: str, pairs: pa.Table) -> Iterator[tuple[str, float]]:
        from vdg.data import prepare

        references, targets = pairs["reference_id"].to_numpy(), pairs["target_id"].to_numpy()
        for index, first in enumerate(range(0, len(pairs), self.job.config.batch_size)):
            chosen = slice(first, first + self.job.config.batch_size)
            plain = np.zeros(len(references[chosen]), np.int64)
            images = [self.features.take(ids[chosen], plain) for ids in (references, targets)]
            reference, target = (prepare(values, self.mean, self.generator.config) for values in images)
            seed = stable_seed(self.job.seed, tables.stable_id(name), index)
            yield from zip(*self.generator.generate(reference, target, self.job.config, seed), strict=True)

    def _write(self, name: str, triplets: list[dict[str, Any]], scores: list[float]) -> None:
        """Write rejects and scores, then the triplets: the part's own file says that all is there."""
        empty = [triplet for triplet in triplets if not triplet["deltas"][0]]
        self.job.output.write_rejects(name, [_reject(triplet) for triplet in empty])
        kept = [(t, s) for t, s in zip(triplets, scores, strict=True) if t["deltas"][0]]
        rows = [{"triplet_id": t["triplet_id"], "scorer": tables.SCORER, "value": s} for t, s in kept]
        self.job.output.write_table(f"scores/{name}", pa.Table.from_pylist(rows, tables.SCORES), tables.SCORES)
        self.job.output.write_table(name, pa.Table.from_pylist([t for t, _ in kept], tables.TRIPLETS), tables.TRIPLETS)


def _image_ids(pairs: Output) -> np.ndarray:
    """All images of all pairs: opened once, so that the actors of a node share one join of pairs and features."""
    table = pairs.read_parts(tables.PAIRS, ["reference_id", "target_id"])
    return np.unique(np.concatenate([column.to_numpy() for column in table.columns]))


def _triplet(pair: dict[str, Any], text: str) -> dict[str, Any]:
    carried = {name: pair[name] for name in ("pair_id", "group_id", "reference_id", "target_id")}
    return {"triplet_id": tables.stable_id("vdg", pair["pair_id"]), **carried, "deltas": [text], "source": "vdg"}


def _reject(triplet: dict[str, Any]) -> dict[str, str]:
    return {
        "key": str(triplet["pair_id"]),
        "stage": "generate",
        "reason": "empty_delta",
        "detail": "the generator wrote no text",
    }
