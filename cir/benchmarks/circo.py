"""CIRCO: queries with several right images among the unlabelled images of COCO 2017."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from cir import metrics
from cir.benchmarks.benchmark import (
    Benchmark,
    Figures,
    Official,
    Protocol,
    Query,
    check_named,
    correct_of,
    expect,
    ids_of,
    image_id,
    read_queries,
    reference_first,
)
from cir.config import Part, Split
from cluster.errors import UserError
from mining import tables
from mining.sources import read_json

QUERIES: dict[Part, int] = {"val": 220, "test": 800}
IMAGES = 123_403
COCO = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
KS = (5, 10, 25, 50)
SUBMITTED = 50


class _Row(BaseModel):
    """`shared_concept` is left out on purpose: it must not be an input."""

    id: int
    reference_img_id: int
    relative_caption: str
    gt_img_ids: list[int] = []
    semantic_aspects: list[str] = []


@dataclass(frozen=True)
class Circo(Benchmark):
    """mAP@K over all right images, R@K of the first of them, and mAP@10 of each semantic aspect."""

    part: Part = "val"
    aspects: tuple[tuple[str, ...], ...] = ()  # of each query

    def figures(self, protocol: Protocol, ranking: pa.Table) -> dict[str, Figures]:
        """AP@K is the sum of the precision at each hit over min(right images, K)."""
        right = np.array([len(query.targets) for query in self.queries])
        precision = {f"mAP@{k}": metrics.average_precision(correct_of(ranking), right, k) for k in KS}
        first = np.array([query.targets[0] for query in self.queries])
        is_first = np.stack(ranking["image_ids"].to_numpy()) == first[:, None]
        found = {f"R@{k}": is_first[:, :k].any(axis=1).astype(np.float64) for k in KS}
        names = sorted({name for aspects in self.aspects for name in aspects})
        has = {name: np.array([name in aspects for aspects in self.aspects]) for name in names}
        by_aspect = {f"mAP@10 {name}": precision["mAP@10"][chosen] for name, chosen in has.items()}
        return {"": precision | found | by_aspect | reference_first(ranking)}

    def descriptions(self) -> dict[str, str]:
        """Of the one protocol."""
        start = f"CIRCO {self.part}, {len(self.queries):,} queries; all {IMAGES:,} unlabelled images of COCO 2017"
        return {"": f"{start}, the reference kept; mAP@K over all right images, R@K of the first one"}

    def submissions(self, protocol: Protocol, image_ids: np.ndarray, groups: list[np.ndarray]) -> dict[str, dict[str, Any]]:
        """COCO's ids of the best 50 images."""
        rows = zip(self.queries, image_ids[:, :SUBMITTED].tolist(), strict=True)
        return {f"{self.part}.json": {query.key: [int(self.names[i]) for i in ids] for query, ids in rows}}


def _name(coco_id: int) -> str:
    return f"{coco_id:012d}"


def names(folder: str, part: Split) -> dict[str, str | None]:
    """Every unlabelled image of COCO 2017: `<12 digits>.jpg`."""
    file = f"{folder}/{COCO}"
    content = read_json(file)
    try:
        ids = [int(image["id"]) for image in content["images"]]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{file}: expected COCO's object with its list of 'images'; take the official file as it is") from None
    found: dict[str, str | None] = dict.fromkeys(map(_name, ids))
    expect(file, "images", len(found), IMAGES)
    return found


def load(folder: str, part: Part, remove_reference: bool | None = None) -> Circo:
    """The queries of val, or of test without their right images."""
    file, known = f"{folder}/annotations/{part}.json", names(folder, part)
    rows = read_queries(file, _Row, QUERIES[part])
    expect(file, "different ids", len({row.id for row in rows}), QUERIES[part])
    for row in rows:
        check_named(file, str(row.id), map(_name, (row.reference_img_id, *row.gt_img_ids)), known)
        if part == "val" and not row.gt_img_ids:
            raise UserError(f"{file}: query {row.id} has no 'gt_img_ids'; take the official file as it is")
    protocols = (Protocol("official", "", {"": ids_of(known)}, remove_reference=False),)
    aspects = tuple(tuple(row.semantic_aspects) for row in rows)
    found = {image_id(name): name for name in known}
    return Circo(tuple(_query(row, part) for row in rows), protocols, found, part=part, aspects=aspects)


def _query(row: _Row, part: Part) -> Query:
    own, reference = tables.stable_id(f"circo.{part}", row.id), image_id(_name(row.reference_img_id))
    targets = tuple(image_id(_name(i)) for i in row.gt_img_ids)
    return Query(str(row.id), own, reference, row.relative_caption, targets if part == "val" else ())


CIRCO = Official(lambda part: [f"annotations/{part}.json"], lambda part: [COCO], names, load)
