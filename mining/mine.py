"""Mine: related pairs of a gallery's images, by the paper's walk or matched to the labelled pairs."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray

from cluster.artifacts import Output
from cluster.config import TaskResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.config import MineConfig
from mining.features import centred, plain_embeddings, read_mean
from mining.gallery import part_name

MINE_VERSION = 1
SIMILARITIES = "similarities.json"  # histograms of gallery, labelled and mined pairs, for the report
HISTOGRAM_BINS = 40
_PairRow = tuple[int | None, int, int, int | None, int | None, float]  # group, rows, ranks, similarity


def mine_pairs(
    output: Output,
    embeddings: Output,
    labelled: Output | None,
    config: MineConfig,
    seed: int,
    resources: TaskResources,
    monitor: Monitor,
) -> None:
    """Write the pairs table in parts of `config.part_rows`, in one Ray task with its own FAISS threads.

    Raises UserError when the gallery has fewer images than a group.
    """
    images = sum(embeddings.part_rows()[part] for part in embeddings.parts() if ".v0." in part)
    if images < config.walk.group_size:
        raise UserError(
            f"mine.gallery: '{config.gallery}' has {images} image(s), fewer than a group of {config.walk.group_size}"
        )
    monitor.start(images, "image")
    task = ray.remote(**resources.ray_options())(_mine)
    ray.get(task.remote(output, embeddings, labelled, config, seed, resources.cpus))
    monitor.advance(images)


def _mine(output: Output, embeddings: Output, labelled: Output | None, config: MineConfig, seed: int, cpus: float) -> None:
    import faiss

    faiss.omp_set_num_threads(max(int(cpus), 1))
    ids, values = plain_embeddings(embeddings)
    vectors = values.mean(axis=1)
    cosine = centred(vectors, read_mean(embeddings))
    labels = _labelled_similarities(ids, cosine, labelled)
    if config.method == "walk":
        pairs = _walked(ids, centred(vectors, np.zeros(1, np.float32)), config, seed)
    else:
        pairs = _matched(ids, cosine, labels, config, seed)
    if not len(pairs):
        raise UserError(f"mine: no pairs found among {len(ids)} images; relax mine.{config.method}")
    for part, start in enumerate(range(0, len(pairs), config.part_rows)):
        output.write_table(part_name(part), pairs.slice(start, config.part_rows), tables.PAIRS)
    output.write_json(SIMILARITIES, _histograms(ids, cosine, labels, pairs, seed))


def _labelled_similarities(ids: np.ndarray, cosine: np.ndarray, labelled: Output | None) -> np.ndarray:
    """Centred cosines of the labelled pairs whose images are in this gallery, float32 [m]."""
    if labelled is None:
        return np.empty(0, np.float32)
    triplets = labelled.read_parts(tables.TRIPLETS, ["reference_id", "target_id"])
    return _similarities(ids, cosine, triplets["reference_id"].to_numpy(), triplets["target_id"].to_numpy())


def _similarities(ids: np.ndarray, cosine: np.ndarray, references: np.ndarray, targets: np.ndarray) -> np.ndarray:
    row_of = {image: row for row, image in enumerate(ids.tolist())}
    rows = [
        (row_of[r], row_of[t]) for r, t in zip(references.tolist(), targets.tolist(), strict=True) if {r, t} <= row_of.keys()
    ]
    left, right = np.array(rows, np.int64).reshape(-1, 2).T
    return np.einsum("nd,nd->n", cosine[left], cosine[right])


def _walked(ids: np.ndarray, vectors: np.ndarray, config: MineConfig, seed: int) -> pa.Table:
    """Nine ordered pairs a group, an ordered pair kept in the first group that has it."""
    from mining.walk import PAIR_RANKS, walk

    seen: set[tuple[int, int]] = set()
    rows: list[_PairRow] = []
    for group in walk(vectors, config.walk, seed):
        group_id = tables.stable_id("group", *ids[list(group.rows)].tolist())
        for ranks in PAIR_RANKS:
            reference, target = (group.rows[rank] for rank in ranks)
            if (reference, target) not in seen:
                seen.add((reference, target))
                rows.append((group_id, reference, target, *ranks, float(vectors[reference] @ vectors[target])))
    return _table(ids, rows)


def _matched(ids: np.ndarray, cosine: np.ndarray, labels: np.ndarray, config: MineConfig, seed: int) -> pa.Table:
    """Pairs in a seeded random order, so that every part of the table is a fair sample."""
    from mining.matched import match

    if not len(labels):
        raise UserError(f"mine.triplets: no labelled pair of '{config.triplets}' has both images in gallery '{config.gallery}'")

    def rows() -> Iterator[_PairRow]:
        for references, targets, scores in match(cosine, labels, config.matched, seed):
            for reference, target, score in zip(references.tolist(), targets.tolist(), scores.tolist(), strict=True):
                yield None, reference, target, None, None, score

    table = _table(ids, list(rows()))
    return table.take(np.random.default_rng(seed).permutation(len(table)))


def _table(ids: np.ndarray, rows: list[_PairRow]) -> pa.Table:
    """Pairs table of (group, reference row, target row, ranks, similarity) tuples."""
    groups, references, targets, *rest = zip(*rows, strict=True) if rows else [()] * 6
    reference_ids, target_ids = ids[list(references)], ids[list(targets)]
    pair_ids = [tables.stable_id("pair", r, t) for r, t in zip(reference_ids.tolist(), target_ids.tolist(), strict=True)]
    columns = [pair_ids, groups, reference_ids, target_ids, *rest]
    return pa.table([pa.array(c, field.type) for c, field in zip(columns, tables.PAIRS, strict=True)], schema=tables.PAIRS)


def _histograms(ids: np.ndarray, cosine: np.ndarray, labels: np.ndarray, pairs: pa.Table, seed: int) -> dict[str, list[float]]:
    """Densities of the centred cosine over [-1, 1]: of random pairs of the gallery, the labelled and the mined pairs."""
    left, right = np.random.default_rng(seed).integers(len(ids), size=(2, 20_000))
    mined = _similarities(ids, cosine, pairs["reference_id"].to_numpy(), pairs["target_id"].to_numpy())
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    series = {"gallery": np.einsum("nd,nd->n", cosine[left], cosine[right]), "labelled": labels, "mined": mined}
    densities = {name: np.histogram(v, edges, density=True)[0].tolist() for name, v in series.items() if len(v)}
    return {"edges": edges.tolist(), **densities}
