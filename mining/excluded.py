"""Leak guards: a gallery's images that must not be mined, as they are a benchmark's val or test images or nearly so."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Output
from mining import tables
from mining.embed import plain_parts, read_ids, read_part
from mining.features import centred, unit_vectors

LISTING = "excluded.parquet"  # tables.EXCLUDED, beside a gallery of the benchmark's images where they are given
ORIGIN = np.zeros(1, np.float32)  # near duplicates are told by the raw cosine, as the walk tells them
Reject = dict[str, str]


@dataclass(frozen=True)
class Excluded:
    """What one benchmark forbids to mine."""

    benchmark: str
    images: Output  # holds LISTING
    embeddings: Output | None  # of those images by the mining tower, where they are given


@dataclass(frozen=True)
class Guard:
    """The gallery that is mined, and what is kept out of its pairs."""

    gallery: Output
    benchmarks: tuple[Excluded, ...]
    similarity: float  # cosine from which an image is a near duplicate


def find_excluded(guard: Guard, embeddings: Output) -> dict[int, Reject]:
    """The embedded images that must not be mined, by id, each with the first reason found.

    Reasons are excluded_name, excluded_prefix (both of the last part of the key), excluded_content (the encoded bytes are
    the same) and near_duplicate.
    """
    embedded = pa.array(np.concatenate([read_ids(embeddings, part) for part in plain_parts(embeddings)]))
    images = guard.gallery.read_parts(tables.GALLERY, ["image_id", "key", "sha256"])
    images = images.filter(pc.is_in(images["image_id"], embedded))
    keys = dict(zip(images["image_id"].to_pylist(), images["key"].to_pylist(), strict=True))
    found: dict[int, Reject] = {}
    for benchmark in guard.benchmarks:
        for image_id, reason, detail in (
            *_listed(images, benchmark.images),
            *_near_duplicates(embeddings, benchmark, guard.similarity),
        ):
            row = {"key": keys[image_id], "stage": "mine", "reason": reason, "detail": f"{benchmark.benchmark}: {detail}"[:200]}
            found.setdefault(image_id, row)
    return found


def _listed(images: pa.Table, excluded: Output) -> Iterator[tuple[int, str, str]]:
    """(image id, reason, detail) of the images that the listing names."""
    listing = excluded.read_table(LISTING, tables.EXCLUDED).to_pylist()
    names = {row["name"] for row in listing if not row["is_prefix"]}
    prefixes = tuple(row["name"] for row in listing if row["is_prefix"])
    hashes = {row["sha256"] for row in listing if row["sha256"]}
    for image_id, key, sha256 in zip(*(images[column].to_pylist() for column in images.column_names), strict=True):
        name = key.rpartition("/")[2]
        if name in names:
            yield image_id, "excluded_name", name
        elif name.startswith(prefixes):
            yield image_id, "excluded_prefix", next(prefix for prefix in prefixes if name.startswith(prefix))
        elif sha256 in hashes:
            yield image_id, "excluded_content", f"sha256 {sha256}"


def _near_duplicates(embeddings: Output, benchmark: Excluded, similarity: float) -> Iterator[tuple[int, str, str]]:
    """(image id, reason, detail) of the images whose nearest image of the benchmark is as similar as that, part by part."""
    import faiss

    if benchmark.embeddings is None:
        return
    ids, vectors = unit_vectors(benchmark.embeddings, ORIGIN)
    listing = benchmark.images.read_parts(tables.GALLERY, ["image_id", "key"])
    keys = dict(zip(listing["image_id"].to_pylist(), listing["key"].to_pylist(), strict=True))
    for part in plain_parts(embeddings):
        image_ids, values = read_part(embeddings, part)
        block = centred(values.mean(axis=1, dtype=np.float32), ORIGIN)
        scores, nearest = (column[:, 0] for column in faiss.knn(block, vectors, 1, metric=faiss.METRIC_INNER_PRODUCT))
        for row in np.flatnonzero(scores >= similarity).tolist():
            yield int(image_ids[row]), "near_duplicate", f"cosine {scores[row]:.3f} with '{keys[ids[nearest[row]]]}'"
