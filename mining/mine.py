"""Mine: related pairs of a gallery's images, by the paper's walk, matched to the labelled pairs, or at random.

One Ray task holds the gallery's vectors: an image's neighbours may be anywhere in it.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster.artifacts import Output
from cluster.config import TaskResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.config import MineConfig, WalkConfig
from mining.embed import view_of
from mining.excluded import ORIGIN, Guard, find_excluded
from mining.features import read_mean, unit_vectors
from mining.gallery import part_name
from mining.matched import Matcher
from mining.matched_groups import draw_groups, thin
from mining.walk import GROUP_SIZE, PAIR_RANKS, Group, walk, without_overlap

MINE_VERSION = 2
PAIRS_VERSION = 1
SIMILARITIES = "similarities.json"  # histograms of gallery, labelled and mined pairs, for the report
HISTOGRAM_BINS = 40
HISTOGRAM_PAIRS = 20_000
COSINES = 4096  # pairs whose vectors are gathered at a time


@dataclass(frozen=True)
class _Mining:
    """What the task that mines is given."""

    output: Output
    embeddings: Output
    labelled: Output | None
    config: MineConfig
    seed: int
    excluded: np.ndarray  # ids of images that are not mined
    shards: dict[str, np.ndarray]  # rows of the anchors of each part that is still to be matched

    def vectors(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], unit vectors float32 [n, dim]) of the images that may be mined."""
        return unit_vectors(self.embeddings, mean, self.excluded)


def mine_pairs(
    output: Output,
    embeddings: Output,
    labelled: Output | None,
    guard: Guard | None,
    config: MineConfig,
    seed: int,
    resources: TaskResources,
    monitor: Monitor,
) -> None:
    """Write the pairs table in parts of `config.part_rows`, in one Ray task with its own FAISS threads.

    Images that the `guard` excludes are rejects of this stage and in no pair. Matched pairs are drawn part by part, so a
    killed stage goes on from the parts that exist; the other methods need all anchors first. Raises UserError when the
    gallery has fewer images than a group, or no pair is found.
    """
    excluded = np.empty(0, np.int64)
    if guard is not None:
        excluded = ray.get(ray.remote(**resources.ray_options())(_exclude).remote(output, embeddings, guard, resources.cpus))
    images = sum(count for part, count in embeddings.part_rows().items() if view_of(part) == 0) - len(excluded)
    if images < GROUP_SIZE:
        less = f" that no benchmark excludes ({len(excluded)} are excluded)" if len(excluded) else ""
        raise UserError(f"mine.gallery: '{config.gallery}' has {images} image(s){less}, fewer than a group of {GROUP_SIZE}")
    shards = _missing_shards(output, images, config, seed) if config.method == "matched" else {}
    left = sum(map(len, shards.values())) if config.method == "matched" else images
    monitor.start(images, "image", images - left)
    job = _Mining(output, embeddings, labelled, config, seed, excluded, shards)
    task: Any = ray.remote(**resources.ray_options())(_mine)
    for searched in task.remote(job, resources.cpus):
        monitor.advance(ray.get(searched))


def _exclude(output: Output, embeddings: Output, guard: Guard, cpus: float) -> np.ndarray:
    """Ids of the images that are not mined; writes them as rejects."""
    _limit_threads(cpus)
    found = find_excluded(guard, embeddings)
    output.write_rejects("excluded.parquet", list(found.values()))
    return np.fromiter(found, np.int64)


def _mine(job: _Mining, cpus: float) -> Iterator[int]:
    """Yields the number of anchors searched, block by block."""
    _limit_threads(cpus)
    write = {"walk": _write_walked, "matched": _write_matched, "matched_groups": _write_groups, "random": _write_random}
    yield from write[job.config.method](job)


def _limit_threads(cpus: float) -> None:
    import faiss

    faiss.omp_set_num_threads(max(int(cpus), 1))


def _write_walked(job: _Mining) -> Iterator[int]:
    ids, vectors = job.vectors(ORIGIN)
    _write_parts(job, (yield from walked(ids, vectors, job.config.walk, job.seed)))
    del vectors  # the centred ones take their place
    _summarise(job, *job.vectors(read_mean(job.embeddings)))


def walked(ids: np.ndarray, vectors: np.ndarray, config: WalkConfig, seed: int) -> Generator[int, None, pa.Table]:
    """Pairs of the walk's groups. Yields as `walk`, returns pairs."""
    return _pairs_of(ids, vectors, (yield from walk(vectors, config, seed)))


def _pairs_of(ids: np.ndarray, vectors: np.ndarray, groups: list[Group]) -> pa.Table:
    """Nine ordered pairs a group, an ordered pair kept in the first group that has it."""
    rows: dict[tuple[int, int], tuple[int, int, int]] = {}
    for group in groups:
        group_id = tables.stable_id("group", *ids[list(group.rows)].tolist())
        for ranks in PAIR_RANKS:
            rows.setdefault((group.rows[ranks[0]], group.rows[ranks[1]]), (group_id, *ranks))
    references, targets = np.array(list(rows), np.int64).reshape(-1, 2).T
    names = ("group_id", "reference_rank", "target_rank")
    columns = dict(zip(names, zip(*rows.values(), strict=True), strict=True)) if rows else {}
    return _table(ids, references, targets, _cosines(vectors, references, targets), columns)


def _write_matched(job: _Mining) -> Iterator[int]:
    ids, cosine = job.vectors(read_mean(job.embeddings))
    matcher = _matcher(job, ids, cosine)
    for name, anchors in job.shards.items():
        drawn = matcher.draw(anchors, np.random.default_rng([job.seed, tables.stable_id(name)]))
        job.output.write_table(name, _table(ids, *drawn, {}), tables.PAIRS)
        yield len(anchors)
    _summarise(job, ids, cosine)


def _write_groups(job: _Mining) -> Iterator[int]:
    ids, cosine = job.vectors(read_mean(job.embeddings))
    matcher, rng = _matcher(job, ids, cosine), np.random.default_rng(job.seed)
    groups = yield from draw_groups(matcher, rng.permutation(len(ids)), job.config.matched.pairs, rng)
    pairs = _pairs_of(ids, cosine, without_overlap(groups, job.config.walk.max_overlap))
    kept = thin(matcher, pairs["similarity"].to_numpy(), pairs["group_id"].to_numpy(), rng)
    _write_parts(job, pairs.filter(pa.array(kept)))
    _summarise(job, ids, cosine)


def _matcher(job: _Mining, ids: np.ndarray, cosine: np.ndarray) -> Matcher:
    labels = _labelled_similarities(job, ids, cosine)
    if not len(labels):
        config = job.config
        raise UserError(f"mine.triplets: no labelled pair of '{config.triplets}' has both images in gallery '{config.gallery}'")
    return Matcher(cosine, labels, job.config.matched, job.seed)


def _write_random(job: _Mining) -> Iterator[int]:
    ids, vectors = job.vectors(ORIGIN)
    references, targets = random_pairs(len(ids), job.config.random.pairs, job.seed)
    _write_parts(job, _table(ids, references, targets, _cosines(vectors, references, targets), {}))
    yield len(ids)
    del vectors
    _summarise(job, *job.vectors(read_mean(job.embeddings)))


def random_pairs(images: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(references [m], targets [m]), rows of distinct images: ordered pairs drawn uniformly without replacement.

    Raises UserError when there are fewer.
    """
    if pairs > (every := images * (images - 1)):
        raise UserError(f"mine.random.pairs: asked for {pairs}, but {images} images have {every} ordered pairs")
    references, others = np.divmod(np.random.default_rng(seed).choice(every, pairs, replace=False), images - 1)
    return references, others + (others >= references)  # the `others` of an image are numbered without itself


def _write_parts(job: _Mining, pairs: pa.Table) -> None:
    for part, start in enumerate(range(0, len(pairs), job.config.part_rows)):
        job.output.write_table(part_name(part), pairs.slice(start, job.config.part_rows), tables.PAIRS)


def labelled_pairs(output: Output, labelled: Output, monitor: Monitor) -> None:
    """Write the pairs of labelled triplets, each ordered pair once, for a generator to write its own deltas of."""
    table = labelled.read_parts(tables.TRIPLETS, ["reference_id", "target_id"])
    pairs = np.unique(np.stack([column.to_numpy() for column in table.columns], axis=1), axis=0)
    monitor.start(len(pairs), "pair")
    rows = np.arange(len(pairs))
    ids = pairs.reshape(-1)
    found = _table(ids, 2 * rows, 2 * rows + 1, np.full(len(pairs), np.nan, np.float32), {})
    output.write_table(part_name(0), found, tables.PAIRS)
    monitor.advance(len(pairs))


def _missing_shards(output: Output, images: int, config: MineConfig, seed: int) -> dict[str, np.ndarray]:
    """Anchors of each part that does not exist: in a seeded order, so that every part is a fair sample of the gallery."""
    count = min(-(-config.matched.pairs // config.part_rows), images)
    shards = np.array_split(np.random.default_rng(seed).permutation(images), count)
    finished = set(output.parts())
    return {part_name(i): shard for i, shard in enumerate(shards) if part_name(i) not in finished}


def _table(
    ids: np.ndarray, references: np.ndarray, targets: np.ndarray, similarity: np.ndarray, columns: dict[str, Any]
) -> pa.Table:
    """Pairs table of rows of the gallery; what `columns` does not give of groups and ranks is null."""
    reference_ids, target_ids = ids[references], ids[targets]
    pair_ids = [tables.stable_id("pair", r, t) for r, t in zip(reference_ids.tolist(), target_ids.tolist(), strict=True)]
    known = {"pair_id": pair_ids, "reference_id": reference_ids, "target_id": target_ids, "similarity": similarity, **columns}
    nulls = [None] * len(references)
    return pa.table([pa.array(known.get(f.name, nulls), f.type) for f in tables.PAIRS], schema=tables.PAIRS)


def _labelled_similarities(job: _Mining, ids: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Centred cosines of the labelled pairs whose images are in this gallery, float32 [m]."""
    if job.labelled is None:
        return np.empty(0, np.float32)
    return _similarities(ids, cosine, job.labelled.read_parts(tables.TRIPLETS, ["reference_id", "target_id"]))


def _similarities(ids: np.ndarray, cosine: np.ndarray, pairs: pa.Table) -> np.ndarray:
    order = np.argsort(ids)
    wanted = np.stack([pairs[name].to_numpy() for name in ("reference_id", "target_id")])
    rows = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return _cosines(cosine, *rows[:, (ids[rows] == wanted).all(axis=0)])


def _cosines(vectors: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Dot products float32 [m] of rows of unit vectors."""
    values = np.empty(len(left), np.float32)
    for first in range(0, len(left), COSINES):
        here = slice(first, first + COSINES)
        values[here] = np.einsum("nd,nd->n", vectors[left[here]], vectors[right[here]])
    return values


def _summarise(job: _Mining, ids: np.ndarray, cosine: np.ndarray) -> None:
    """Write densities over [-1, 1] of the centred cosine: of random pairs of the gallery, labelled and mined pairs."""
    pairs = job.output.read_parts(tables.PAIRS, ["reference_id", "target_id"])
    if not len(pairs):
        raise UserError(f"mine: no pairs found among {len(ids)} images; relax mine.{job.config.method}")
    rng = np.random.default_rng(job.seed)
    series = {
        "gallery": _cosines(cosine, *rng.integers(len(ids), size=(2, HISTOGRAM_PAIRS))),
        "labelled": _labelled_similarities(job, ids, cosine),
        "mined": _similarities(ids, cosine, pairs.take(rng.permutation(len(pairs))[:HISTOGRAM_PAIRS])),
    }
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    densities = {name: np.histogram(values, edges, density=True)[0].tolist() for name, values in series.items() if len(values)}
    job.output.write_json(SIMILARITIES, {"edges": edges.tolist(), **densities})
