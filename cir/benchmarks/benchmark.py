"""What a benchmark is to the evaluate stage: queries, the galleries they are ranked in, and how hits are counted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError

from cir import metrics
from cir.config import Part, Split
from cluster.errors import UserError
from mining import tables
from mining.sources import read_json

GALLERY = "evaluate"  # the ingested gallery of every benchmark
TOP = 50  # images of a ranking that are kept: what the servers ask for
Figures = dict[str, np.ndarray]  # metric -> a value in 0..1 of each query it is the mean of
RowT = TypeVar("RowT", bound=BaseModel)


@dataclass(frozen=True)
class Query:
    """One query; images by id."""

    key: str  # as its file and the servers name it
    query_id: int
    reference: int
    text: str
    targets: tuple[int, ...] = ()  # every right image, the query's own target first; empty where labels are hidden
    group: int | None = None
    members: tuple[int, ...] = ()  # images of its group, the reference and the target among them; empty where not known
    gallery: str = ""  # the one of the protocol's galleries that it searches


@dataclass(frozen=True)
class Protocol:
    """One way to rank: among which images, and whether the query's reference is taken out."""

    name: str  # part of file names
    label: str  # stands in parentheses behind its metrics; "" for the benchmark's own protocol
    galleries: Mapping[str, np.ndarray] | None  # ids of the images of each gallery; None: every image there is
    remove_reference: bool

    def search(self, queries: Iterable[Query]) -> metrics.QuerySet:
        """What `metrics.rank_all` takes."""
        queries = list(queries)
        references = np.array([query.reference for query in queries], np.int64)
        targets = np.array([query.targets[0] if query.targets else metrics.NO_IMAGE for query in queries], np.int64)
        if self.galleries is None:
            return metrics.QuerySet(references, targets, self.remove_reference)
        places = {name: i for i, name in enumerate(self.galleries)}
        chosen = np.array([places[query.gallery] for query in queries])
        galleries = tuple(np.unique(ids) for ids in self.galleries.values())
        return metrics.QuerySet(references, targets, self.remove_reference, galleries, chosen)


@dataclass(frozen=True)
class Benchmark(ABC):
    """Queries and the protocols they are scored by, the benchmark's own first. Travels to the Ray tasks."""

    queries: tuple[Query, ...]
    protocols: tuple[Protocol, ...]
    names: Mapping[int, str]  # of the gallery's images
    field: str = "evaluate.annotations"  # of the config, for messages
    top: int = TOP
    by_generator: bool = False  # whether the queries' texts are a generator's

    def asked(self, written: Mapping[tuple[int, int], Sequence[str]]) -> Self:
        """The same queries with a generator's delta of (reference, target); one that it wrote nothing of asks nothing."""
        texts = (written.get((query.reference, query.targets[0]), [""])[0] for query in self.queries)
        queries = tuple(replace(query, text=text) for query, text in zip(self.queries, texts, strict=True))
        return replace(self, queries=queries, by_generator=True)

    @abstractmethod
    def figures(self, protocol: Protocol, ranking: pa.Table) -> dict[str, Figures]:
        """Label -> metrics, from a ranking (evaluate.RANKINGS) by one of the protocols."""

    @abstractmethod
    def descriptions(self) -> dict[str, str]:
        """What each label's numbers are: split, gallery, whether the reference is removed, what is right."""

    def submissions(self, protocol: Protocol, image_ids: np.ndarray, groups: list[np.ndarray]) -> dict[str, dict[str, Any]]:
        """File name -> content for the benchmark's server, from ids best first [queries, top] and of each query's group."""
        return {}

    def correct(self, image_ids: np.ndarray) -> np.ndarray:
        """bool, as `image_ids` int64 [queries, top]: whether each is one of its query's right images."""
        rows = zip(image_ids.tolist(), self.queries, strict=True)
        return np.array([[image in query.targets for image in row] for row, query in rows])

    @property
    def classes_of_queries(self) -> np.ndarray:
        """int64 [queries]: equal where queries ask for the same thing: here the same target."""
        return np.array([query.targets[0] if query.targets else -i - 1 for i, query in enumerate(self.queries)], np.int64)

    @property
    def hidden(self) -> bool:
        """Whether the labels are with a server alone."""
        return not any(query.targets for query in self.queries)

    @cached_property
    def query_images(self) -> np.ndarray:
        """Sorted ids of the images that queries name."""
        named = [(query.reference, *query.targets, *query.members) for query in self.queries]
        return np.unique(np.fromiter((image for images in named for image in images), np.int64))

    @property
    def images(self) -> np.ndarray:
        """Sorted ids of all images that must have vectors."""
        galleries = [ids for protocol in self.protocols for ids in (protocol.galleries or {}).values()]
        return np.unique(np.concatenate([self.query_images, *galleries]))

    def table(self) -> pa.Table:
        """The queries as triplets (tables.TRIPLETS); without a target where labels are hidden."""
        rows = [
            {
                "triplet_id": query.query_id,
                "group_id": query.group,
                "reference_id": query.reference,
                "target_id": query.targets[0] if query.targets else None,
                "deltas": [query.text],
                "source": "human",
            }
            for query in self.queries
        ]
        return pa.Table.from_pylist(rows, tables.TRIPLETS)


@dataclass(frozen=True)
class Official:
    """How a benchmark's own folder is read. Each function raises UserError naming the file that is wrong."""

    captions: Callable[[Part], list[str]]  # paths inside the folder that `load` reads
    splits: Callable[[Split], list[str]]  # those that `names` and `load` read
    names: Callable[[str, Split], dict[str, str | None]]  # images of a split, each with its path where the files give one
    load: Callable[[str, Part, bool | None], Benchmark]  # folder, split, evaluate.remove_reference
    prefixes: tuple[str, ...] = ()  # of the names that its images have in the collection they come from


def image_id(name: str) -> int:
    """Id of an image of a benchmark."""
    return tables.stable_id(GALLERY, name)


def ids_of(names: Iterable[str]) -> np.ndarray:
    """Ids int64 of some images."""
    return np.fromiter(map(image_id, names), np.int64)


def recalls(correct: np.ndarray, ks: Iterable[int]) -> Figures:
    """R@K from `correct` bool [queries, top]."""
    return {f"R@{k}": np.asarray(correct[:, :k].any(axis=1), np.float64) for k in ks}


def target_recalls(ranking: pa.Table, ks: Iterable[int]) -> Figures:
    """R@K of a ranking where the target alone is right."""
    ranks = ranking["target_rank"].to_numpy()  # NaN where there is none
    return {f"R@{k}": (ranks <= k).astype(np.float64) for k in ks}


def reference_first(ranking: pa.Table) -> Figures:
    """How often the reference ranks first, or would have, from a ranking."""
    return {"reference first": ranking["reference_first"].to_numpy().astype(np.float64)}


def correct_of(ranking: pa.Table) -> np.ndarray:
    """bool [queries, top] of a ranking."""
    return np.stack(ranking["correct"].to_numpy())


def read_queries(file: str, row: type[RowT], count: int) -> list[RowT]:
    """Queries of an official file. Raises UserError naming the file when a row is malformed, or others are there."""
    try:
        rows = TypeAdapter(list[row]).validate_python(read_json(file))  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:]))
        where = f"row {first['loc'][0]}: {place}" if first["loc"] else "the whole file"
        raise UserError(f"{file}: {where}: {first['msg']}; take the official file as it is") from None
    expect(file, "queries", len(rows), count)
    return rows


def expect(file: str, what: str, found: int, expected: int) -> None:
    """Raises UserError when a file has not the official number of things."""
    if found != expected:
        raise UserError(f"{file}: found {found:,} {what}, expected {expected:,} as published; take the official file as it is")


def check_named(file: str, key: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError when a query names an image that its split does not have."""
    if missing := [name for name in names if name not in known]:
        raise UserError(f"{file}: query {key} names {missing[0]!r}, which the image split does not list; the files do not fit")
