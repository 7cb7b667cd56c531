"""What the embeddings of an earlier state of a gallery spare the next: an image that is the same is not embedded again."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.artifacts import Output
from mining import tables
from mining.embeddings import read_part, view_part

_FROM, _COUNT = b"reused_from", b"reused"


@dataclass(frozen=True)
class Earlier:
    """Finished embeddings by the same tower and in the same views, and the gallery that they are of."""

    embeddings: Output
    gallery: Output
    ranges: tuple[tuple[str, str, str], ...]  # part of the gallery, first and last key: keys are sorted over the parts

    @property
    def name(self) -> str:
        """Instance and digest, as the output's folder is named."""
        return self.embeddings.location[1].rpartition("/")[2]

    def find(self, images: pa.Table, view: int) -> dict[int, np.ndarray]:
        """Values float16 [tokens, dim] of those rows of a gallery table whose bytes are the same, by id in their order."""
        hashes = _hashes(images)
        known: dict[int, np.ndarray] = {}
        keys = pc.min_max(images["key"]).as_py() if len(images) else {"min": "", "max": ""}
        for part in (part for part, first, last in self.ranges if first <= keys["max"] and keys["min"] <= last):
            rows = _hashes(self.gallery.read_table(part, tables.GALLERY, ["image_id", "sha256"]))
            same = {image_id for image_id, sha256 in rows.items() if hashes.get(image_id) == sha256}
            if same:
                ids, values = read_part(self.embeddings, view_part(part, view))
                known.update((i, v) for i, v in zip(ids.tolist(), values, strict=True) if i in same)
        return {image_id: known[image_id] for image_id in hashes if image_id in known}


def open_earlier(embeddings: Output, gallery: Output) -> Earlier:
    """Finished embeddings and their gallery, whose parts' first and last keys are read from their footers."""
    ranges, key = [], tables.GALLERY.get_field_index("key")
    for part in gallery.parts():
        with gallery.open_parquet(part) as file:
            footer = file.metadata
        found = [footer.row_group(i).column(key).statistics for i in range(footer.num_row_groups)]
        groups = [statistics for statistics in found if statistics is not None and statistics.has_min_max]
        if groups:
            ranges.append((part, min(group.min for group in groups), max(group.max for group in groups)))
    return Earlier(embeddings, gallery, tuple(ranges))


def _hashes(images: pa.Table) -> dict[int, str]:
    return dict(zip(images["image_id"].to_pylist(), images["sha256"].to_pylist(), strict=True))


def note_reused(table: pa.Table, name: str, count: int) -> pa.Table:
    """The table with a note in its file's metadata: how many rows are from which earlier output."""
    return table.replace_schema_metadata({_FROM: name, _COUNT: str(count)}) if count else table


def count_reused(output: Output, parts: Iterable[str]) -> dict[str, int]:
    """Rows of some parts that are from earlier outputs, by output."""
    counts: Counter[str] = Counter()
    for part in parts:
        with output.open_parquet(part) as file:
            notes = file.schema_arrow.metadata or {}
        if _COUNT in notes:
            counts[notes[_FROM].decode()] += int(notes[_COUNT])
    return dict(counts)
