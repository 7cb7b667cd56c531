"""One's own table of triplets as a benchmark: the whole gallery is ranked, the reference removed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cir import metrics
from cir.benchmarks.benchmark import (
    TOP,
    Benchmark,
    Figures,
    Protocol,
    Query,
    correct_of,
    recalls,
    reference_first,
    target_recalls,
)
from cir.config import EvaluateConfig
from cluster.artifacts import Output
from cluster.errors import UserError
from mining import tables
from mining.gallery import GROUPS, keys
from mining.sources import read_json


@dataclass(frozen=True)
class Triplets(Benchmark):
    """R@K of the images with the target's attributes where those are given, else of the target alone."""

    config: EvaluateConfig = field(default_factory=EvaluateConfig)
    classes: Mapping[int, int] | None = None  # a number that stands for an image's attributes

    def correct(self, image_ids: np.ndarray) -> np.ndarray:
        """By attributes where there are classes."""
        if self.classes is None:
            return super().correct(image_ids)
        targets = np.array([query.targets[0] for query in self.queries])
        return metrics.correct_by_attributes(image_ids, targets, dict(self.classes))

    @property
    def classes_of_queries(self) -> np.ndarray:
        """By the target's attributes where there are any."""
        targets = super().classes_of_queries
        return targets if self.classes is None else np.array([self.classes[target] for target in targets.tolist()], np.int64)

    def figures(self, protocol: Protocol, ranking: pa.Table) -> dict[str, Figures]:
        """Rs@K over the queries whose groups list their members: known through triplets alone one would be too easy."""
        config, hits = self.config, target_recalls(ranking, self.config.recalls)
        if self.classes is not None:
            hits = recalls(correct_of(ranking), config.recalls) | {f"exact {name}": values for name, values in hits.items()}
        subset = ranking["subset_rank"].drop_null().to_numpy()
        if len(subset):
            hits |= {f"Rs@{k}": subset <= k for k in config.subset_recalls}
        return {"": {name: values.astype(np.float64) for name, values in hits.items()} | reference_first(ranking)}

    def descriptions(self) -> dict[str, str]:
        """Of the one protocol."""
        right = "the target alone is right" if self.classes is None else "every image with the target's attributes is right"
        return {"": f"{len(self.queries):,} queries; the whole gallery, the reference removed, {right}"}


def load(queries: Output, gallery: Output, attributes: str | None, config: EvaluateConfig) -> Triplets:
    """From ingested triplets. Raises UserError when there are none, or `attributes` (JSON: key -> object) do not fit."""
    table = queries.read_parts(tables.TRIPLETS)
    if not len(table):
        raise UserError(f"evaluate.triplets: {queries.uri} has no triplets")
    listed = queries.read_table(GROUPS, tables.GROUPS).to_pylist() if queries.exists(GROUPS) else []
    groups = {row["group_id"]: tuple(row["image_ids"]) for row in listed}  # every image of each
    asked = tuple(_query(row, groups) for row in table.to_pylist())
    classes = _attribute_classes(attributes, gallery, table) if attributes else None
    protocols = (Protocol("triplets", "", None, remove_reference=True),)
    top = max(TOP, *config.recalls)
    return Triplets(asked, protocols, {}, field="evaluate.triplets", top=top, config=config, classes=classes)


def _query(row: dict[str, Any], groups: dict[int, tuple[int, ...]]) -> Query:
    own, group = row["triplet_id"], row["group_id"]
    return Query(str(own), own, row["reference_id"], row["deltas"][0], (row["target_id"],), group, groups.get(group, ()))


def check_attributes(file: str, field: str = "evaluate.attributes") -> dict[str, Any]:
    """Attributes by key, of a file that a field of the config names. Raises UserError when the file is not a JSON object."""
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{field}: {file} holds a {type(content).__name__}, expected an object: key -> attributes")
    return content


def _attribute_classes(file: str, gallery: Output, queries: pa.Table) -> dict[int, int]:
    """A number for each image's attributes. Raises UserError when the file is unreadable or a target has none."""
    content = check_attributes(file)
    ids = keys(gallery)
    texts = {ids[key]: json.dumps(value, sort_keys=True) for key, value in content.items() if key in ids}
    without = set(queries["target_id"].to_pylist()) & set(ids.values()) - set(texts)
    if without:
        name = next(key for key, image in ids.items() if image in without)
        raise UserError(f"evaluate.attributes: {file} has no attributes of {len(without)} target images, such as {name!r}")
    numbers = {text: i for i, text in enumerate(sorted(set(texts.values())))}
    return {image: numbers[text] for image, text in texts.items()}
