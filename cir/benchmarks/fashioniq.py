"""FashionIQ: dress, shirt and toptee, each its own gallery; R@10 and R@50 of each and their plain mean."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, Field

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
from mining.labelled import joined
from mining.sources import read_json

Category = Literal["dress", "shirt", "toptee"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
TRAIN_QUERIES = {"dress": 5985, "shirt": 5988, "toptee": 6027}
VAL_QUERIES = {"dress": 2017, "shirt": 2038, "toptee": 1961}
IMAGES: dict[Split, dict[str, int]] = {
    "train": {"dress": 11_452, "shirt": 19_036, "toptee": 16_121},
    "val": {"dress": 3817, "shirt": 6346, "toptee": 5373},
    "test": {"dress": 3818, "shirt": 6346, "toptee": 5374},
}
VAL_PROTOCOL = "VAL protocol, references ∪ targets galleries"


class _Row(BaseModel):
    candidate: str
    target: str
    captions: list[str] = Field(min_length=2, max_length=2)


@dataclass(frozen=True)
class FashionIq(Benchmark):
    """R@K of each category, and their mean as "R@K". The values behind a mean are weighted to give the plain one."""

    clean: np.ndarray = field(default_factory=lambda: np.empty(0, bool))  # queries that no train triplet of others touches

    @property
    def _clean_label(self) -> str:
        return f"clean val, {int(self.clean.sum()):,} queries"

    def figures(self, protocol: Protocol, ranking: pa.Table) -> dict[str, Figures]:
        """Of the original split also over the clean queries alone."""
        found = target_recalls(ranking, (10, 50))
        everything = np.ones(len(self.queries), bool)
        if protocol.label:
            return {protocol.label: self._by_category(found, everything)}
        first = reference_first(ranking)
        return {"": self._by_category(found, everything) | first, self._clean_label: self._by_category(found, self.clean)}

    def _by_category(self, found: Figures, chosen: np.ndarray) -> Figures:
        categories = np.array([query.gallery for query in self.queries])[chosen]
        counts = {category: int((categories == category).sum()) for category in CATEGORIES}
        weights = np.array([len(categories) / (len(CATEGORIES) * counts[category]) for category in categories])
        means = {name: values[chosen] * weights for name, values in found.items()}
        own = {f"{n} {c}": values[chosen][categories == c] for c in CATEGORIES for n, values in found.items()}
        return means | own

    def descriptions(self) -> dict[str, str]:
        """Of the original split, the VAL protocol, and the clean queries."""
        own, val = self.protocols

        def sizes(protocol: Protocol) -> str:
            return " / ".join(f"{len(ids):,}" for ids in (protocol.galleries or {}).values())

        reference = "removed" if own.remove_reference else "kept"
        start = f"FashionIQ val, {len(self.queries):,} queries, dress / shirt / toptee and their mean"
        end = f"the reference {reference}, the target alone is right"
        original = f"original split ({sizes(own)} images), {end}"
        return {
            "": f"{start}; {original}",
            val.label: f"{start}; galleries of references and targets alone ({sizes(val)} images), {end}",
            self._clean_label: f"FashionIQ val, queries whose images no train triplet of another category uses; {original}",
        }


def names(folder: str, part: Split) -> dict[str, str | None]:
    """Every image of a split, over the categories. The files give ids: an image is `<id>.png` or `<id>.jpg`."""
    return dict.fromkeys(name for category in CATEGORIES for name in _split(folder, category, part))


def _split(folder: str, category: str, part: Split) -> list[str]:
    file = f"{folder}/image_splits/split.{category}.{part}.json"
    content = read_json(file)
    if not isinstance(content, list):
        raise UserError(f"{file}: expected a list of image ids; take the official file as it is")
    expect(file, "images", len(set(content)), IMAGES[part][category])
    return content


def load(folder: str, part: Part = "val", remove_reference: bool | None = None) -> FashionIq:
    """The queries of val of all three categories. The reference stays in the ranking unless `remove_reference`."""
    rows = {c: read_queries(f"{folder}/captions/cap.{c}.val.json", _Row, VAL_QUERIES[c]) for c in CATEGORIES}
    train = {c: read_queries(f"{folder}/captions/cap.{c}.train.json", _Row, TRAIN_QUERIES[c]) for c in CATEGORIES}
    galleries = {c: _split(folder, c, part) for c in CATEGORIES}
    queries, clean = [], []
    for category in CATEGORIES:
        known, others = set(galleries[category]), _images([row for c in CATEGORIES if c != category for row in train[c]])
        for place, row in enumerate(rows[category]):
            key = f"{category}.{place}"
            check_named(f"{folder}/captions/cap.{category}.val.json", key, (row.candidate, row.target), known)
            queries.append(_query(key, category, row))
            clean.append(not others & {row.candidate, row.target})
    removed = bool(remove_reference)
    protocols = (
        Protocol("original", "", {c: ids_of(galleries[c]) for c in CATEGORIES}, removed),
        Protocol("val", VAL_PROTOCOL, {c: ids_of(sorted(_images(rows[c]))) for c in CATEGORIES}, removed),
    )
    found = {image_id(name): name for listed in galleries.values() for name in listed}
    return FashionIq(tuple(queries), protocols, found, clean=np.array(clean))


def _images(rows: list[_Row]) -> set[str]:
    return {name for row in rows for name in (row.candidate, row.target)}


def _query(key: str, category: str, row: _Row) -> Query:
    own = tables.stable_id("fashioniq.val", key)
    targets = (image_id(row.target),)
    return Query(key, own, image_id(row.candidate), joined(row.captions), targets, gallery=category)


FASHIONIQ = Official(
    # captions of train tell which queries of val are clean
    lambda part: [f"captions/cap.{category}.{split}.json" for category in CATEGORIES for split in ("train", "val")],
    lambda part: [f"image_splits/split.{category}.{part}.json" for category in CATEGORIES],
    names,
    load,
)
