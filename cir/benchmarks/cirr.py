"""CIRR (rc2): every image of the split is ranked, the reference removed; and the group of six of each query."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from cir.benchmarks.benchmark import (
    Benchmark,
    Figures,
    Official,
    Protocol,
    Query,
    check_named,
    expect,
    ids_of,
    image_id,
    read_queries,
    reference_first,
    target_recalls,
)
from cir.config import Part, Split
from cluster.errors import UserError
from mining import tables
from mining.sources import read_json

SPLITS: dict[Split, str] = {"train": "train", "val": "val", "test": "test1"}
QUERIES: dict[Part, int] = {"val": 4181, "test": 4148}
IMAGES: dict[Split, int] = {"train": 16_939, "val": 2297, "test": 2315}
SUBMITTED, SUBMITTED_OF_GROUP = 50, 3


class _Group(BaseModel):
    id: int
    members: list[str]


class _Row(BaseModel):
    pairid: int
    reference: str
    caption: str
    img_set: _Group
    target_hard: str | None = None


@dataclass(frozen=True)
class Cirr(Benchmark):
    """R@K, Rs@K among the five others of the group, and Avg = (R@5 + Rs@1) / 2 (CIRR's validation and server)."""

    part: Part = "val"

    def figures(self, protocol: Protocol, ranking: pa.Table) -> dict[str, Figures]:
        """Of the restricted gallery R@K and Avg: the recall within groups does not depend on the gallery."""
        subset = ranking["subset_rank"].to_numpy()
        within = {f"Rs@{k}": (subset <= k).astype(np.float64) for k in (1, 2, 3)}
        found = target_recalls(ranking, (1, 5, 10, 50))
        average = {"Avg": (found["R@5"] + within["Rs@1"]) / 2}
        if protocol.label:
            return {protocol.label: found | average}
        return {"": found | within | average | reference_first(ranking)}

    def descriptions(self) -> dict[str, str]:
        """Of both galleries."""
        start = f"CIRR rc2 {SPLITS[self.part]}, {len(self.queries):,} queries"
        end = "the reference removed, the target alone is right"
        official = f"{start}; all {IMAGES[self.part]:,} images of the split, {end}; Rs@K among the 5 others of the group"
        restricted = self.protocols[1].label
        return {"": official, restricted: f"{start}; {restricted}, as in the VDG paper; {end}"}

    def submissions(self, protocol: Protocol, image_ids: np.ndarray, groups: list[np.ndarray]) -> dict[str, dict[str, Any]]:
        """Names of the best 50 images and of the best 3 of the group, as the server takes them."""
        suffix = f"_{protocol.name}" if protocol.label else ""
        files = {f"recall{suffix}.json": self._submission("recall", list(image_ids[:, :SUBMITTED]))}
        if not protocol.label:
            best = [group[:SUBMITTED_OF_GROUP] for group in groups]
            files["recall_subset.json"] = self._submission("recall_subset", best)
        return files

    def _submission(self, metric: str, ranked: list[np.ndarray]) -> dict[str, Any]:
        rows = zip(self.queries, ranked, strict=True)
        return {"version": "rc2", "metric": metric} | {q.key: [self.names[i] for i in ids.tolist()] for q, ids in rows}


def _captions(part: Part) -> str:
    return f"captions/cap.rc2.{SPLITS[part]}.json"


def _split(part: Split) -> str:
    return f"image_splits/split.rc2.{SPLITS[part]}.json"


def names(folder: str, part: Split) -> dict[str, str | None]:
    """Name -> path inside `img_raw`. Images of val are under dev/, which also holds images of no query."""
    file = f"{folder}/{_split(part)}"
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected an object that maps each name to its path; take the official file as it is")
    expect(file, "images", len(content), IMAGES[part])
    return content


def load(folder: str, part: Part, remove_reference: bool | None = None) -> Cirr:
    """The queries of val, or of test1 without their targets."""
    file, known = f"{folder}/{_captions(part)}", names(folder, part)
    rows = read_queries(file, _Row, QUERIES[part])
    queries = tuple(_query(file, row, known, part) for row in rows)
    expect(file, "different pairids", len({row.pairid for row in rows}), QUERIES[part])
    used = {row.reference for row in rows} | {row.target_hard for row in rows if row.target_hard}
    kind = "references-only gallery" if part == "test" else "references ∪ targets gallery"
    protocols = (
        Protocol("official", "", {"": ids_of(known)}, remove_reference=True),
        Protocol("restricted", f"{kind}, {len(used):,} images", {"": ids_of(used)}, remove_reference=True),
    )
    return Cirr(queries, protocols, {image_id(name): name for name in known}, part=part)


def _query(file: str, row: _Row, known: dict[str, str | None], part: Part) -> Query:
    group, key = row.img_set, str(row.pairid)
    expect(f"{file}: query {key}", "different images in its group", len(set(group.members)), 6)
    check_named(file, key, (row.reference, *group.members), known)
    if (part == "val" and row.target_hard not in group.members) or row.reference not in group.members:
        raise UserError(f"{file}: query {key}: its group lacks the reference or the target; take the official file as it is")
    return Query(
        key,
        tables.stable_id(_captions(part), key),
        image_id(row.reference),
        row.caption,
        (image_id(row.target_hard),) if row.target_hard and part == "val" else (),
        tables.stable_id("group", group.id),
        tuple(map(image_id, group.members)),
    )


CIRR = Official(lambda part: [_captions(part)], lambda part: [_split(part)], names, load, prefixes=("dev-", "test1-"))
