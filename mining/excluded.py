"""Leak guards: a gallery's images that must not be mined, as they are a benchmark's val or test images or nearly so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Output, reject_row
from mining import tables
from mining.embeddings import gallery_part, read_part
from mining.features import ORIGIN, centred, unit_vectors

LISTING = "excluded.parquet"  # tables.EXCLUDED, beside a gallery of the benchmark's images where they are given
Reject = dict[str, str]


@dataclass(frozen=True)
class Excluded:
    """What one benchmark forbids to mine."""

    benchmark: str
    images: Output  # holds LISTING
    embeddings: Output | None  # of those images by the mining tower, where they are given


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
        images = _images(self.gallery, part, image_ids)
        keys = dict(zip(images["image_id"].to_pylist(), images["key"].to_pylist(), strict=True))
        found: dict[int, Reject] = {}
        for benchmark, listing, looks in self._benchmarks:
            for image_id, reason, detail in (*listing.find(images), *looks.find(image_ids, values, self.similarity)):
                found.setdefault(image_id, reject_row("exclude", keys[image_id], reason, f"{benchmark}: {detail}"))
        return found


def _images(gallery: Output, part: str, image_ids: np.ndarray) -> pa.Table:
    """Names and hashes of the images of one part of the embeddings."""
    images = gallery.read_table(gallery_part(part), tables.GALLERY, ["image_id", "key", "sha256"])
    return images.filter(pc.is_in(images["image_id"], pa.array(image_ids)))


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
