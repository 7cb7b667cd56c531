"""The stage exclude: the images of a gallery that no benchmark's val or test images keep from being mined.

The photos of a run's own held-out queries never come into its gallery: `without` of `mining/ingest.py`. A query's own photo is
taken out of its ranking by `cir/benchmarks/benchmark.py` (`remove_reference`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Output, reject_row
from cluster.config import ActorResources
from cluster.parts import run_actors
from cluster.stage import RunContext, Stage
from mining import tables
from mining.embeddings import gallery_part, plain_parts, read_ids, read_part
from mining.features import ORIGIN, centred, unit_vectors

LISTING = "excluded.parquet"  # tables.EXCLUDED, beside a gallery of the benchmark's images where they are given
Reject = dict[str, str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Exclude(Stage):
    """`exclude:<gallery>`: the ids of the images that may be mined, in the parts of the embeddings; the others are rejects."""

    table = "images"
    gallery: Stage
    embeddings: Stage
    benchmarks: Mapping[str, Stage]  # benchmark -> names and hashes of its val and test images
    looks: Mapping[str, Stage] = field(default_factory=dict)  # benchmark -> embeddings of them, where the images are given
    duplicate_similarity: float
    resources: ActorResources

    @property
    def reject_limit(self) -> float:
        """Any number of images may be excluded: that is what it was asked for."""
        return 1.0

    def work(self, output: Output, run: RunContext) -> None:
        """Part by part of the embeddings."""
        looks = {name: run.output(stage) for name, stage in self.looks.items()}
        benchmarks = tuple(Excluded(name, run.output(images), looks.get(name)) for name, images in self.benchmarks.items())
        embeddings = run.output(self.embeddings)
        job = _Job(output, run.output(self.gallery), embeddings, benchmarks, self.duplicate_similarity)
        sizes = embeddings.part_rows()
        run_actors(
            _Excluder, job, {part: sizes[part] for part in plain_parts(embeddings)}, self.resources, run.monitor, "image"
        )


@dataclass(frozen=True)
class Excluded:
    """What one benchmark forbids to mine."""

    benchmark: str
    images: Output  # holds LISTING
    embeddings: Output | None  # of those images by the mining tower, where they are given


@dataclass(frozen=True)
class _Job:
    output: Output
    gallery: Output
    embeddings: Output
    benchmarks: tuple[Excluded, ...]
    similarity: float


class _Excluder:
    """An actor that holds what the benchmarks forbid."""

    def __init__(self, job: _Job, cpus: float) -> None:
        from mining.search import limit_faiss_threads

        limit_faiss_threads(cpus)
        self.job, self.guards = job, Guards(job.gallery, job.benchmarks, job.similarity)

    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write one part."""
        part, job = str(row["part"][0]), self.job
        ids, found = read_ids(job.embeddings, part), self.guards.find(job.embeddings, part)
        free = ids[np.isin(ids, list(found), invert=True)]
        job.output.write_rejects(part, list(found.values()))
        job.output.write_table(part, pa.table([free], schema=tables.MINEABLE), tables.MINEABLE)
        return {"part": [part], "rows": [len(ids)]}


class Guards:
    """What several benchmarks forbid to mine of one gallery."""

    def __init__(self, gallery: Output, benchmarks: Sequence[Excluded], similarity: float) -> None:
        self.gallery, self.similarity = gallery, similarity  # the latter a cosine from which an image is a near duplicate
        self._benchmarks = [(excluded.benchmark, _Listing(excluded), _Looks(excluded)) for excluded in benchmarks]

    def find(self, embeddings: Output, part: str) -> dict[int, Reject]:
        """The images of one part of the embeddings that must not be mined, by id, each with the first reason found.

        Reasons are excluded_name, excluded_prefix (both of the last part of the key), excluded_content (the encoded bytes
        are the same) and near_duplicate.
        """
        image_ids, values = read_part(embeddings, part)
        images = self.gallery.read_table(gallery_part(part), tables.GALLERY, ["image_id", "key", "sha256"])
        images = images.filter(pc.is_in(images["image_id"], pa.array(image_ids)))
        keys = dict(zip(images["image_id"].to_pylist(), images["key"].to_pylist(), strict=True))
        found: dict[int, Reject] = {}
        for benchmark, listing, looks in self._benchmarks:
            for image_id, reason, detail in (*listing.find(images), *looks.find(image_ids, values, self.similarity)):
                found.setdefault(image_id, reject_row("exclude", keys[image_id], reason, f"{benchmark}: {detail}"))
        return found


class _Listing:
    """Images that a benchmark names."""

    def __init__(self, excluded: Excluded) -> None:
        listing = excluded.images.read_table(LISTING, tables.EXCLUDED).to_pylist()
        self.names = {row["name"] for row in listing if not row["is_prefix"]}
        self.prefixes = tuple(row["name"] for row in listing if row["is_prefix"])
        self.hashes = {row["sha256"] for row in listing if row["sha256"]}

    def find(self, images: pa.Table) -> Iterator[tuple[int, str, str]]:
        """(image id, reason, detail) of the images that are named."""
        for image_id, key, sha256 in zip(*(images[column].to_pylist() for column in images.column_names), strict=True):
            name = key.rpartition("/")[2]
            if name in self.names:
                yield image_id, "excluded_name", name
            elif name.startswith(self.prefixes):
                yield image_id, "excluded_prefix", next(prefix for prefix in self.prefixes if name.startswith(prefix))
            elif sha256 in self.hashes:
                yield image_id, "excluded_content", f"sha256 {sha256}"


class _Looks:
    """Images of a benchmark, where they are given."""

    def __init__(self, excluded: Excluded) -> None:
        self.vectors: np.ndarray | None = None
        if excluded.embeddings is not None:
            self.ids, self.vectors = unit_vectors(excluded.embeddings, ORIGIN)
            listing = excluded.images.read_parts(tables.GALLERY, ["image_id", "key"])
            self.keys = dict(zip(listing["image_id"].to_pylist(), listing["key"].to_pylist(), strict=True))

    def find(self, image_ids: np.ndarray, values: np.ndarray, similarity: float) -> Iterator[tuple[int, str, str]]:
        """(image id, reason, detail) of the images whose nearest image of the benchmark is as similar as that."""
        import faiss

        if self.vectors is None:
            return
        block = centred(values.mean(axis=1, dtype=np.float32), ORIGIN)
        scores, nearest = (column[:, 0] for column in faiss.knn(block, self.vectors, 1, metric=faiss.METRIC_INNER_PRODUCT))
        for row in np.flatnonzero(scores >= similarity).tolist():
            detail = f"cosine {scores[row]:.3f} with '{self.keys[self.ids[nearest[row]]]}'"
            yield int(image_ids[row]), "near_duplicate", detail
