"""Mine: related pairs of a gallery's images, by the paper's walk, matched to the labelled pairs, or at random.

One Ray task searches the gallery: an image's neighbours may be anywhere in it. The vectors lie in a memory-mapped file.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.artifacts import Output
from cluster.config import TaskResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.config import MineConfig
from mining.embeddings import view_of
from mining.excluded import ORIGIN, Guard, find_excluded
from mining.features import read_mean, unit_vectors
from mining.gallery import part_name
from mining.neighbours import Neighbours, blocks_of
from mining.pairs.matched import Matcher
from mining.pairs.matched_groups import draw_groups, thin
from mining.pairs.similarities import cosines, labelled_rows, write_similarities
from mining.pairs.walk import GROUP_SIZE, PAIR_RANKS, groups_of, pairs_of, shuffled, without_overlap

MINE_VERSION = 2
PAIRS_VERSION = 1
NEIGHBOURS = "neighbours.json"  # the index that found the neighbours, and its recall
CANDIDATES = "candidates"  # folder of the walk's groups before the overlap rule: what a killed walk goes on from
_CANDIDATE = pa.schema([("rows", pa.list_(pa.int32(), GROUP_SIZE))])  # of the images that may be mined
_RANKS = np.array(PAIR_RANKS)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Mining:
    """What the task that mines is given."""

    output: Output
    embeddings: Output
    labelled: Output | None
    config: MineConfig
    seed: int
    excluded: np.ndarray  # ids of images that are not mined
    shards: dict[str, np.ndarray]  # rows of the anchors of each part that is still to be walked from or matched

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

    Images that the `guard` excludes are rejects of this stage and in no pair. Anchors are searched part by part, so a killed
    stage goes on from the parts that exist; matched groups are drawn in one go. Raises UserError when the gallery has fewer
    images than a group, or no pair is found.
    """
    excluded = np.empty(0, np.int64)
    if guard is not None:
        excluded = ray.get(ray.remote(**resources.ray_options())(_exclude).remote(output, embeddings, guard, resources.cpus))
    images = sum(count for part, count in embeddings.part_rows().items() if view_of(part) == 0) - len(excluded)
    if images < GROUP_SIZE:
        less = f" that no benchmark excludes ({len(excluded)} are excluded)" if len(excluded) else ""
        raise UserError(f"mine.gallery: '{config.gallery}' has {images} image(s){less}, fewer than a group of {GROUP_SIZE}")
    shards = _missing_shards(output, images, config, seed)
    left = images if shards is None else sum(map(len, shards.values()))
    monitor.start(images, "image", images - left)
    job = _Mining(output, embeddings, labelled, config, seed, excluded, shards or {})
    task: Any = ray.remote(**resources.ray_options())(_mine)
    for searched in task.remote(job, resources.cpus):
        monitor.advance(ray.get(searched))
    if output.exists(NEIGHBOURS):
        _LOG.info("mine: neighbours by %s", output.read_json(NEIGHBOURS))


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
    if not sum(job.output.part_rows().values()):
        raise UserError(f"mine: no pairs found among the images of '{job.config.gallery}'; relax mine.{job.config.method}")
    write_similarities(job.output, job.embeddings, job.excluded, job.labelled, job.seed)


def _limit_threads(cpus: float) -> None:
    import faiss

    faiss.omp_set_num_threads(max(int(cpus), 1))


def _write_walked(job: _Mining) -> Iterator[int]:
    ids, vectors = job.vectors(ORIGIN)
    if job.shards:
        neighbours = Neighbours(vectors, job.config.walk.top, job.config.index, job.seed)
        job.output.write_json(NEIGHBOURS, neighbours.report)
        for name, anchors in job.shards.items():
            rows = pa.FixedSizeListArray.from_arrays(groups_of(neighbours, anchors, job.config.walk).ravel(), GROUP_SIZE)
            job.output.write_table(f"{CANDIDATES}/{name}", pa.table([rows], schema=_CANDIDATE), _CANDIDATE)
            yield len(anchors)
    groups = without_overlap(shuffled(_candidates(job.output), len(ids), job.seed), len(ids), job.config.walk)
    _write_grouped(job, ids, vectors, groups, *pairs_of(groups, len(ids)))


def _candidates(output: Output) -> np.ndarray:
    """Groups int32 [m, 6] of all anchors, in the order of the anchors."""
    parts = [output.read_table(f"{CANDIDATES}/{name}", _CANDIDATE)["rows"] for name in output.names(CANDIDATES)]
    return np.concatenate([pc.list_flatten(rows).to_numpy() for rows in parts]).reshape(-1, GROUP_SIZE)


def _write_grouped(
    job: _Mining, ids: np.ndarray, vectors: np.ndarray, groups: np.ndarray, group: np.ndarray, place: np.ndarray
) -> None:
    """Write the pairs at some places of some groups."""

    def part(here: slice) -> pa.Table:
        references, targets = _members(groups, group[here], place[here])
        group_ids = [tables.stable_id("group", *members) for members in ids[groups[group[here]]].tolist()]
        columns = {"group_id": group_ids, "reference_rank": _RANKS[place[here], 0], "target_rank": _RANKS[place[here], 1]}
        return _table(ids, references, targets, cosines(vectors, references, targets), columns)

    _write_parts(job, len(group), part)


def _write_matched(job: _Mining) -> Iterator[int]:
    if not job.shards:
        return
    ids, cosine = job.vectors(read_mean(job.embeddings))
    matcher = _matcher(job, ids, cosine)
    for name, anchors in job.shards.items():
        drawn = matcher.draw(anchors, np.random.default_rng([job.seed, tables.stable_id(name)]))
        job.output.write_table(name, _table(ids, *drawn, {}), tables.PAIRS)
        yield len(anchors)


def _write_groups(job: _Mining) -> Iterator[int]:
    ids, cosine = job.vectors(read_mean(job.embeddings))
    matcher, rng = _matcher(job, ids, cosine), np.random.default_rng(job.seed)
    drawn = yield from draw_groups(matcher, rng.permutation(len(ids)), job.config.matched.pairs, rng)
    groups = without_overlap(drawn, len(ids), job.config.walk)
    group, place = pairs_of(groups, len(ids))
    kept = thin(matcher, cosines(cosine, *_members(groups, group, place)), group, rng)
    _write_grouped(job, ids, cosine, groups, group[kept], place[kept])


def _members(groups: np.ndarray, group: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the references and targets at some places of some groups."""
    return groups[group, _RANKS[place, 0]], groups[group, _RANKS[place, 1]]


def _matcher(job: _Mining, ids: np.ndarray, cosine: np.ndarray) -> Matcher:
    labels = cosines(cosine, *labelled_rows(ids, job.labelled))
    if not len(labels):
        config = job.config
        raise UserError(f"mine.triplets: no labelled pair of '{config.triplets}' has both images in gallery '{config.gallery}'")
    matcher = Matcher(cosine, labels, job.config.matched, job.seed, job.config.index)
    job.output.write_json(NEIGHBOURS, matcher.neighbours.report)
    return matcher


def _write_random(job: _Mining) -> Iterator[int]:
    ids, vectors = job.vectors(ORIGIN)
    references, targets = random_pairs(len(ids), job.config.random.pairs, job.seed)

    def part(here: slice) -> pa.Table:
        return _table(ids, references[here], targets[here], cosines(vectors, references[here], targets[here]), {})

    _write_parts(job, len(references), part)
    yield len(ids)


def random_pairs(images: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(references [m], targets [m]), rows of distinct images: ordered pairs drawn uniformly without replacement.

    Raises UserError when there are fewer.
    """
    if pairs > (every := images * (images - 1)):
        raise UserError(f"mine.random.pairs: asked for {pairs}, but {images} images have {every} ordered pairs")
    references, others = np.divmod(np.random.default_rng(seed).choice(every, pairs, replace=False), images - 1)
    return references, others + (others >= references)  # the `others` of an image are numbered without itself


def _write_parts(job: _Mining, pairs: int, part: Callable[[slice], pa.Table]) -> None:
    """Write the parts that are missing, each from its own pairs alone."""
    finished, rows = set(job.output.parts()), job.config.part_rows
    for index, start in enumerate(range(0, pairs, rows)):
        if part_name(index) not in finished:
            job.output.write_table(part_name(index), part(slice(start, start + rows)), tables.PAIRS)


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


def _missing_shards(output: Output, images: int, config: MineConfig, seed: int) -> dict[str, np.ndarray] | None:
    """Rows of the anchors of each part that does not exist: of the walk's candidates, or of the table of matched pairs.

    Matched anchors come in a seeded order, so that every part is a fair sample of the gallery. None for the other methods.
    """
    if config.method == "walk":
        shards, finished = blocks_of(np.arange(images)), set(output.names(CANDIDATES))
    elif config.method == "matched":
        count = min(-(-config.matched.pairs // config.part_rows), images)
        shards, finished = np.array_split(np.random.default_rng(seed).permutation(images), count), set(output.parts())
    else:
        return None
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
