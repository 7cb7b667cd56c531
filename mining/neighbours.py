"""The stage neighbours: each image's nearest in its gallery, and their exact cosines.

Actors take blocks of images and meet the gallery's vectors shard by shard: all need not fit in an actor's memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.parts import run_actors
from cluster.stage import RunContext, Stage
from mining import tables
from mining.config import IndexConfig
from mining.embeddings import plain_parts
from mining.features import ORIGIN, read_mean, unit_vectors
from mining.gallery import part_name
from mining.indexes import filled, kind_for
from mining.scratch import new_array, shared
from mining.search import Exact, Lists, Search, TopK, limit_faiss_threads, neighbours_of, plan

BLOCK = 4096  # images of one part
REPORT = "neighbours.json"  # how the neighbours were found, and with which recall
LISTS = "lists.faiss"  # trained and empty: every node fills the same ones


@dataclass(frozen=True, eq=False, kw_only=True)
class Neighbours(Stage):
    """`neighbours:<tower>.<gallery>`: the `top` nearest of each image that may be mined, best first.

    Small galleries are searched exactly, larger ones through inverted lists; a GPU searches any gallery exactly, unless the
    config asks for lists. Actors, nodes and threads change nothing.
    """

    table = "neighbours"
    embeddings: Stage
    mineable: Stage | None = None  # of the images, where some are excluded
    top: int
    center: Stage | None = None  # cosines are of the vectors less this mean; None: raw
    index: IndexConfig
    seed: int
    resources: ActorResources

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when the gallery has no images."""
        embeddings, mineable = run.output(self.embeddings), run.output(self.mineable) if self.mineable else None
        rows = (mineable or embeddings).part_rows()
        images = sum(rows[part] for part in plain_parts(embeddings))
        index = "exact" if self.resources.gpus and self.index.kind == "auto" else kind_for(self.index, images)
        parts = {part_name(i): block for i, block in enumerate(blocks(images))}
        center = run.output(self.center) if self.center else None
        job = _Job(output, embeddings, mineable, center, self.top, self.resources.gpus > 0, parts)
        if not _is_planned(output):
            self._plan(job, index, images)
        sizes = {part: last - first for part, (first, last) in parts.items()}
        run_actors(_Searcher, job, sizes, self.resources, run.monitor, "image")

    def _plan(self, job: "_Job", index: str, images: int) -> None:
        """Write how to search, once for all actors."""
        if index == "exact" or not self.top:
            job.output.write_json(REPORT, {"index": "exact", "images": images, "top": self.top, "recall": 1.0})
            return
        import ray

        options: Any = self.resources.ray_options()
        task: Any = ray.remote(**options)(_write_plan)
        ray.get(task.remote(job, self.index, self.seed, self.resources.cpus))


@dataclass(frozen=True)
class _Job:
    output: Output
    embeddings: Output
    mineable: Output | None
    center: Output | None
    top: int
    on_gpu: bool
    blocks: dict[str, tuple[int, int]]  # first and last + 1 of the rows of each part

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], unit vectors float32 [n, dim])."""
        return unit_vectors(self.embeddings, read_mean(self.center) if self.center else ORIGIN, self.mineable)


def _write_plan(job: _Job, index: IndexConfig, seed: int, cpus: float) -> None:
    import faiss

    limit_faiss_threads(cpus)
    report, lists = plan(job.vectors()[1], job.top, index, seed)
    job.output.write_bytes(LISTS, faiss.serialize_index(lists).tobytes())
    job.output.write_json(REPORT, report | job.output.hashes([LISTS]))


def _is_planned(output: Output) -> bool:
    """Whether an earlier run of the stage left a plan, and the lists that it tells of."""
    try:
        plan = output.read_json(REPORT, dict[str, Any])
        return "index" in plan and (plan["index"] == "exact" or output.hashes([LISTS])[LISTS] == plan.get(LISTS))
    except (FileNotFoundError, UserError):
        return False


class _Searcher:
    """An actor that searches block by block."""

    def __init__(self, job: _Job, cpus: float) -> None:
        limit_faiss_threads(cpus)
        self.job = job
        self.ids, vectors = job.vectors()
        self.search = _opened(job, vectors)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write one part."""
        part = str(row["part"][0])
        rows = np.arange(*self.job.blocks[part])
        self.job.output.write_table(
            part, _to_table(self.ids, rows, neighbours_of(self.search, rows, self.job.top)), tables.NEIGHBOURS
        )
        return {"part": [part], "rows": [len(rows)]}


def _opened(job: _Job, vectors: np.ndarray) -> Search:
    report = job.output.read_json(REPORT)
    if report["index"] != "exact":
        import faiss

        lists = faiss.deserialize_index(np.frombuffer(job.output.read_bytes(LISTS), np.uint8))
        index = filled(lists, vectors, report["index"] == "ondisk")
        index.nprobe = report["nprobe"]
        return Lists(vectors, index)
    if job.on_gpu:
        from cluster.devices import device
        from mining.block_product import BlockProduct

        return BlockProduct(vectors, device())
    return Exact(vectors)


def _to_table(ids: np.ndarray, rows: np.ndarray, best: TopK) -> pa.Table:
    """Places that no neighbour fills are left out."""
    found, cosines = best
    offsets = pa.array(np.append(0, (found >= 0).sum(axis=1).cumsum()), pa.int32())
    neighbour_ids = pa.ListArray.from_arrays(offsets, pa.array(ids[found[found >= 0]]))
    return pa.table(
        [ids[rows], neighbour_ids, pa.ListArray.from_arrays(offsets, cosines[found >= 0])], schema=tables.NEIGHBOURS
    )


def blocks(images: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of the rows of each part."""
    count = -(-images // BLOCK)
    return ((images * i // count, images * (i + 1) // count) for i in range(count))


@dataclass(frozen=True)
class Nearest:
    """The table of neighbours as arrays, memory-mapped from one file a node."""

    ids: np.ndarray  # int64 [n], in the order of the gallery
    rows: np.ndarray  # int32 [n, top] of the neighbours among `ids`; -1 where a place has none
    cosines: np.ndarray  # float32 [n, top]; -inf there

    def blocks(self) -> Iterator[slice]:
        """The rows of each part."""
        return (slice(*block) for block in blocks(len(self.ids)))


def read_neighbours(output: Output) -> Nearest:
    """The table of a finished `Neighbours`."""
    ids = output.read_parts(tables.NEIGHBOURS, ["image_id"])["image_id"].to_numpy()
    folder = shared(repr(("neighbours", output)).encode() + ids.tobytes(), ".nearest", partial(_write_arrays, output, ids))
    return Nearest(ids, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "cosines")))


def _write_arrays(output: Output, ids: np.ndarray, folder: Path) -> None:
    folder.mkdir()
    order, shape = np.argsort(ids), (len(ids), output.read_json(REPORT)["top"])
    rows = new_array(folder / "rows.npy", np.int32, shape)
    cosines = new_array(folder / "cosines.npy", np.float32, shape)
    first = 0
    for name in output.parts():
        part = output.read_table(name, tables.NEIGHBOURS)
        here = slice(first, first := first + len(part))
        found = pc.list_value_length(part["cosines"]).to_numpy()
        places = np.arange(shape[1]) < found[:, None]  # bool [n, top]: that are filled
        rows[here], cosines[here] = -1, -np.inf
        neighbours = pc.list_flatten(part["neighbour_ids"]).to_numpy()
        rows[here][places] = order[np.searchsorted(ids, neighbours, sorter=order)]
        cosines[here][places] = pc.list_flatten(part["cosines"]).to_numpy()
