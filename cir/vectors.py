"""The vectors that are searched: a gallery's cached embeddings, or those of a file."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cir.benchmarks.benchmark import Benchmark, image_id
from cluster.artifacts import Output, filesystem
from cluster.errors import UserError
from cluster.files import is_text
from mining.embeddings import plain_parts, read_part
from mining.features import Features
from mining.sources import is_textual, texts

BLOCK = 1024  # rows of a file that are read at a time
COLUMNS = ["kind", "key", "vector"]
Take = Callable[[np.ndarray], np.ndarray]
Blocks = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Embedded:
    """The plain view of a gallery that went through the embed stage. Travels to the Ray tasks, as `Given` does."""

    embeddings: Output

    def check(self, benchmark: Benchmark) -> None:
        """Raises UserError when an image that the benchmark needs has no vector."""
        Features(self.embeddings).check(benchmark.images, benchmark.field)

    def open(self, image_ids: np.ndarray) -> Take:
        """What gives float32 [n, dim] of ids [n], all of them in `image_ids`. Memory-mapped, once a node."""
        source = Features(self.embeddings).open_plain(image_ids)
        return lambda ids: source.take(ids, np.zeros(len(ids), np.int64))[:, 0]

    def blocks(self) -> Blocks:
        """(ids [m], float32 [m, dim]) of the whole gallery, part by part."""
        for part in plain_parts(self.embeddings):
            ids, values = read_part(self.embeddings, part)
            yield ids, values[:, 0].astype(np.float32)


@dataclass(frozen=True)
class Given:
    """A Parquet file of vectors, made by any model: columns `kind` ("query" or "gallery"), `key` and `vector` (floats).

    A query's key is CIRR's pairid, FashionIQ's category and row counted from 0 ("dress.17"), or CIRCO's id; an image's is
    its name in the split files, CIRCO's with 12 digits. Vectors are compared by cosine.
    """

    file: str

    def check(self, benchmark: Benchmark) -> None:
        """As `Embedded`; also that vectors are finite, not zero, of one width, and that no key comes twice."""
        keys: dict[str, Counter[str]] = {"query": Counter(), "gallery": Counter()}
        widths: set[int] = set()
        for batch in self._batches():
            for kind, found in keys.items():
                found.update(batch.filter(pc.equal(batch["kind"], kind))["key"].to_pylist())
            values = self._vectors(batch)
            widths.add(values.shape[1])
            if len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1) | ~values.any(axis=1))):
                raise self._wrong(f"the vector of {batch['key'][int(bad[0])].as_py()!r} is zero or not finite")
        if len(widths) > 1:
            raise self._wrong(f"vectors of widths {sorted(widths)}; queries and images need one width")
        for kind, found in keys.items():
            if twice := [key for key, count in found.items() if count > 1]:
                raise self._wrong(f"{len(twice)} {kind} keys come more than once, such as {twice[0]!r}")
        known = {image_id(key) for key in keys["gallery"]}
        images = [benchmark.names[i] for i in benchmark.images.tolist() if i not in known]
        queries = [query.key for query in benchmark.queries if query.key not in keys["query"]]
        for kind, missing in (("query", queries), ("gallery", images)):
            if missing:
                raise self._wrong(f"{len(missing):,} {kind} vectors are missing, such as that of {missing[0]!r}")

    def _wrong(self, detail: str) -> UserError:
        return UserError(f"evaluate.embeddings: {self.file}: {detail}")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            system, path = filesystem(self.file)
            with system.open_input_file(path) as stream:
                file = pq.ParquetFile(stream)
                if missing := set(COLUMNS) - set(file.schema_arrow.names):
                    raise self._wrong(f"no column {', '.join(sorted(missing))}; it needs {', '.join(COLUMNS)}")
                for batch in file.iter_batches(BLOCK, columns=COLUMNS):
                    yield self._checked(batch)
        except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
            raise self._wrong(f"cannot be read as Parquet: {error}") from error

    def _checked(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Of texts and lists of numbers, whatever types they are written in."""
        kinds = {name: batch[name].type for name in COLUMNS}
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        is_list = any(check(kinds["vector"]) for check in lists)
        numeric = is_list and (pa.types.is_floating(inner := kinds["vector"].value_type) or pa.types.is_integer(inner))
        if not (is_textual(kinds["kind"]) and is_textual(kinds["key"]) and numeric):
            found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise self._wrong(f"found {found}; kind and key are texts, vector is a list of numbers")
        kind, key = texts(batch["kind"]), texts(batch["key"])
        if bad := [text for text in kind + key if text is None or not is_text(text)]:
            raise self._wrong(f"the kind or key {bad[0]!r} is null, or not UTF-8")
        return pa.record_batch([pa.array(kind, pa.string()), pa.array(key, pa.string()), batch["vector"]], COLUMNS)

    def _vectors(self, batch: pa.RecordBatch) -> np.ndarray:
        """float32 [rows, dim] of a batch with rows."""
        widths = pc.unique(pc.list_value_length(batch["vector"])).to_pylist()
        if len(widths) != 1 or not widths[0]:
            raise self._wrong(f"vectors of widths {widths}; queries and images need one width")
        return pc.list_flatten(batch["vector"]).to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, widths[0])

    def _rows(self, kind: Literal["query", "gallery"]) -> Blocks:
        """(keys [n], float32 [n, dim]) of one kind, block by block."""
        for batch in self._batches():
            chosen = batch.filter(pc.equal(batch["kind"], kind))
            if len(chosen):
                yield np.array(chosen["key"].to_pylist()), self._vectors(chosen)

    def queries(self, keys: list[str]) -> np.ndarray:
        """Query vectors float32 [keys, dim]."""
        found = {key: vector for names, values in self._rows("query") for key, vector in zip(names, values, strict=True)}
        return np.stack([found[key] for key in keys])

    def open(self, image_ids: np.ndarray) -> Take:
        """As `Embedded`, held in memory."""
        wanted = np.unique(image_ids)
        kept = [(ids[here], values[here]) for ids, values in self.blocks() if (here := np.isin(ids, wanted)).any()]
        ids, values = (np.concatenate(column) for column in zip(*kept, strict=True))
        order = np.argsort(ids)
        return lambda asked: values[order[np.searchsorted(ids, asked, sorter=order)]]

    def blocks(self) -> Blocks:
        """As `Embedded`, some rows of the file each."""
        for keys, values in self._rows("gallery"):
            yield np.array([image_id(key) for key in keys], np.int64), values


Vectors = Embedded | Given  # one vector an image
