"""Listing the images of an outside source: a folder, tar files, or Parquet files of bytes."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from cluster.artifacts import filesystem, reject_row
from cluster.errors import UserError, shown
from cluster.files import AGAIN, SPECIAL, File, files_below, is_hidden, is_text
from mining.config import GalleryConfig
from mining.images import has_suffix, without_suffix
from mining.tars import naming, read_members, resolve

INDEX = pa.schema([("key", pa.string()), ("uri", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
LISTED_ROWS = 8192  # rows that are Python objects at a time
LARGEST = 1 << 30  # bytes of an encoded image
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_Row = tuple[str, str, int, int]  # as in INDEX
_Image = tuple[str, str, int, int]  # path inside the source or row's key, key, offset, length


class Listing(NamedTuple):
    """What a source holds: every file is an image, a reject, or counted as left out."""

    index: pa.Table  # of the images, sorted by key
    rejects: list[dict[str, str]]
    left_out: dict[str, int]  # what -> number


@dataclass
class _Aside:
    """What is found beside the images."""

    rejects: list[dict[str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def list_images(config: GalleryConfig, field: str) -> Listing:
    """The images of a gallery.

    Rejects are files that cannot be read, names that are not UTF-8 or have no image, and second uses of a name; hidden files
    and other files than images are left out and counted. Raises UserError when the source is missing or holds no image, or a
    Parquet file has other columns. A key is the path inside the source without suffix, in Unicode's composed form (NFC).
    """
    files, aside = config.split or [], _Aside()
    names = {name: path for file in files for name, path in read_names(file).items()} if files else None
    split = ", ".join(files)
    rows, rejects = _table(_listed(config.images, names, field, aside)), aside.rejects
    if not len(rows):
        wrong = "".join(f"; {row['key']} is {row['reason']}: {row['detail']}" for row in rejects[:1])
        seen = "; found " + counted(aside.left_out) if aside.left_out else ""
        wanted = f" for the names of {split}" if names else ""
        raise UserError(f"{field}: no image found in {config.images}{wanted}{seen}{wrong}")
    first = _first_of_its_key(rows["key"])
    again = np.flatnonzero(first != np.arange(len(rows)))
    rejects += [
        reject(row["key"], "duplicate_name", f"{row['uri']} has the name of {kept['uri']}")
        for row, kept in zip(rows.take(again).to_pylist(), rows.take(first[again]).to_pylist(), strict=True)
    ]
    known = set(rows["key"].to_pylist()) if names else set()
    rejects += [reject(name, "missing_image", f"named in {split}") for name in names or () if name not in known]
    index = rows.filter(pa.array(first == np.arange(len(rows)))) if len(again) else rows
    return Listing(index, rejects, dict(aside.left_out.most_common()))


def counted(left_out: Mapping[str, int]) -> str:
    """What was left out, the most frequent first."""
    return ", ".join(f"{count:,} {what}" for what, count in Counter(left_out).most_common(8))


def _table(rows: Iterator[_Row]) -> pa.Table:
    """Rows as an Arrow table, sorted: as Python objects those of a large gallery would be most of the driver's memory."""
    blocks = [INDEX.empty_table()]
    while block := list(islice(rows, LISTED_ROWS)):
        columns = zip(*block, strict=True)
        blocks.append(pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX, strict=True)], schema=INDEX))
    return pa.concat_tables(blocks).sort_by([(name, "ascending") for name in INDEX.names])


def _first_of_its_key(keys: pa.ChunkedArray) -> np.ndarray:
    """Of each row the first row with the same key; keys are sorted."""
    new = np.ones(len(keys), bool)
    new[1:] = pc.not_equal(keys[1:], keys[:-1]).to_numpy()
    return np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))


def read_json(file: str) -> Any:
    """Content of an outside JSON file. Raises UserError naming the file."""
    try:
        return json.loads(read_file(file, "JSON"))
    except RecursionError as error:
        raise UserError(f"{file}: cannot be read as JSON: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error


def read_file(file: str, form: str) -> bytes:
    """Content of an outside file, which is to be of a form. Raises UserError naming the file."""
    try:
        system, path = filesystem(file)
        with system.open_input_file(path) as stream:
            return stream.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(file)}: cannot be read as {form}: {error}") from error


def read_names(file: str) -> dict[str, str | None]:
    """Names of a split file, each with its path where the file gives one."""
    content = read_json(file)
    paths = content.values() if isinstance(content, dict) else ()
    are_names = isinstance(content, list | dict) and all(
        isinstance(name, int | str) and name != "" and is_text(str(name)) for name in content
    )
    if are_names and all(isinstance(path, str) for path in paths):
        found = content.items() if isinstance(content, dict) else ((name, None) for name in content)
        return {normal(str(name)): path for name, path in found}
    raise UserError(f"{file}: expected a list of names, or an object that maps each name to its path")


def normal(name: str) -> str:
    """A name in Unicode's composed form: macOS and some archives write the decomposed one."""
    return unicodedata.normalize("NFC", name)


reject = partial(reject_row, "ingest")  # of key, reason and detail


def _listed(uri: str, names: dict[str, str | None] | None, field: str, aside: _Aside) -> Iterator[_Row]:
    """Rows of the images of a source, of these names alone where they are given; all else is put aside."""
    try:
        system, base = filesystem(uri)
        info = system.get_file_info(base)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {shown(uri)} cannot be read: {error}") from error
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{field}: {uri} does not exist; give a folder of images, or tar or Parquet files")
    files = [File(base, info.base_name, info.size)] if info.is_file else files_below(system, base)
    by_path = {normal(path.removeprefix("./")): name for name, path in (names or {}).items() if path}
    for file in files:
        if not _is_plain(file, aside):
            continue
        for path, key, offset, length in _images_in(system, file, aside):
            name = by_path.get(normal(path), normal(key))
            if names is not None and name not in names:
                aside.left_out["images that the split does not name"] += 1
            elif length > LARGEST:
                aside.rejects.append(reject(name, "too_large", f"{length:,} bytes, more than {LARGEST:,}"))
            else:
                yield name, _location(file.path, uri, base), offset, length


def _is_plain(file: File, aside: _Aside) -> bool:
    """Whether a file is to be looked into; others are put aside."""
    if file.broken:
        aside.rejects.append(reject(file.relative, "unreadable", file.broken))
    elif file.aside:
        aside.left_out[file.aside] += 1
    elif is_hidden(file.relative):
        aside.left_out[_HIDDEN] += 1
    elif not is_text(file.path):
        aside.rejects.append(reject(file.relative, "not_utf8", "the file's name is not UTF-8; rename it"))
    else:
        return True
    return False


def _kind(name: str) -> str:
    """What a file that is no image is called in the counts."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if not suffixes:
        return "files without suffix"
    if suffixes[-1] in (".heic", ".heif", ".hif"):
        return f"{suffixes[-1]} (install pillow-heif to read them)"
    return "".join(suffixes[-2:]) if suffixes[-2:-1] == [".tar"] else shown(suffixes[-1])


def _location(path: str, source: str, base: str) -> str:
    """Where a file of a source is: an absolute path, or a URI with the source's scheme and query."""
    if "://" not in source:
        return path
    parts = urlsplit(source)
    return parts._replace(path=parts.path.rstrip("/") + quote(path.removeprefix(base))).geturl()


def _images_in(system: pafs.FileSystem, file: File, aside: _Aside) -> Iterator[_Image]:
    """(path, key, offset, length) of the images of one file: itself, a tar's members, or a Parquet file's rows."""
    kind = PurePosixPath(file.path).suffix.lower()
    if kind in _CONTAINERS:
        with system.open_input_file(file.path) as stream:  # one that cannot be opened may be there the next time: no reject
            try:
                yield from _CONTAINERS[kind](stream, file, aside)
            except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
                aside.rejects.append(reject(file.relative, "unreadable", str(error).strip()))
    elif has_suffix(file.relative):
        yield file.relative, without_suffix(file.relative), 0, file.size
    else:
        aside.left_out[_kind(file.relative)] += 1


def _members(stream: pa.NativeFile, file: File, aside: _Aside) -> Iterator[_Image]:
    """Images of a tar file."""
    found = read_members(stream)
    linked, again = resolve(found)
    members = [*found.files, *linked]
    key_of = naming(name for name, _, _ in members)
    for name, offset, length in members:
        if is_hidden(name):
            aside.left_out[_HIDDEN] += 1
        elif not has_suffix(name):
            aside.left_out[_kind(name)] += 1
        elif not is_text(name):
            aside.rejects.append(reject(f"{file.relative} {name}", "not_utf8", "the member's name is not UTF-8"))
        else:
            yield str(PurePosixPath(name)), key_of(name), offset, length
    aside.left_out.update({AGAIN: again} if again else {})
    aside.left_out.update({SPECIAL: found.special} if found.special else {})
    aside.rejects += [reject(f"{file.relative} {name}", "unreadable", why) for name, why in found.broken]
    if found.error:
        aside.rejects.append(reject(file.relative, "unreadable", found.error))


def _rows(stream: pa.NativeFile, file: File, aside: _Aside) -> Iterator[_Image]:
    """Images of a Parquet file. Raises UserError when it has other columns, ArrowException or OSError where it is broken."""
    parquet = pq.ParquetFile(stream)
    column = _key_column(parquet.schema_arrow, file.path)
    groups, rows = (parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)), max(parquet.metadata.num_rows, 1)
    length = sum(group.total_byte_size for group in groups) // rows  # the mean: the file does not list each one's
    blocks = (
        texts(block[0].field("path") if column == "image.path" else block[0])
        for block in parquet.iter_batches(LISTED_ROWS, columns=[column])
    )
    for row, key in enumerate(chain.from_iterable(blocks)):
        if not key:
            aside.rejects.append(reject(f"{file.relative} row {row}", "no_key", "its key is null or empty"))
        elif not is_text(key):
            aside.rejects.append(reject(f"{file.relative} row {row}", "not_utf8", f"its key {key!r} is not UTF-8"))
        else:
            yield key, without_suffix(key), row, length


def texts(values: pa.Array | pa.ChunkedArray) -> list[str | None]:
    """Texts, categories or whole numbers as texts; bytes that are not UTF-8 as surrogates."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_integer(values.type):
        return values.cast(pa.string()).to_pylist()
    raw = values.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]


def is_textual(kind: pa.DataType) -> bool:
    """Whether `texts` takes a column of this type."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    return any(check(kind) for check in checks)


def _key_column(schema: pa.Schema, path: str) -> str:
    """The column that names a row's image: `key`, else the path beside its bytes. Raises UserError when columns lack."""
    found = {field.name: field.type for field in schema}
    image = found.get("image", pa.null())
    inner = {field.name: field.type for field in image} if pa.types.is_struct(image) else {"bytes": image}
    column, kind = ("key", found["key"]) if "key" in found else ("image.path", inner.get("path", pa.null()))
    if not is_textual(kind) or inner.get("bytes") not in _BYTES:
        columns = ", ".join(f"{name} ({kind})" for name, kind in found.items())
        raise UserError(
            f"{path}: has the columns {columns}; give it `key`, the image's name as a string, and `image`, its encoded bytes "
            "or a struct with them as `bytes` (and, for want of a `key`, the name as `path`)"
        )
    return column


_HIDDEN = "hidden or system files"
_CONTAINERS: dict[str, Callable[[pa.NativeFile, File, _Aside], Iterator[_Image]]] = {
    ".tar": _members,
    ".parquet": _rows,
}


class BytesReader:
    """Reads encoded images by (uri, offset, length); keeps the Parquet row group it read last."""

    def __init__(self) -> None:
        self._group: tuple[str, int, pa.ChunkedArray] | None = None  # uri, first row, images

    def read(self, uri: str, offset: int, length: int) -> bytes:
        """Encoded bytes of one image. Raises OSError when they cannot be read."""
        system, path = filesystem(uri)
        if path.lower().endswith(".parquet"):
            return self._from_parquet(uri, offset)
        with system.open_input_file(path) as stream:
            return stream.read_at(length, offset)

    def _from_parquet(self, uri: str, row: int) -> bytes:
        if self._group is None or self._group[0] != uri or not 0 <= row - self._group[1] < len(self._group[2]):
            self._group = uri, *_row_group(uri, row)
        return self._group[2][row - self._group[1]].as_py() or b""


def _row_group(uri: str, row: int) -> tuple[int, pa.ChunkedArray]:
    """The first row, and the images, of the row group that holds a row."""
    system, path = filesystem(uri)
    try:
        with system.open_input_file(path) as stream:
            file, first, group = pq.ParquetFile(stream), 0, 0
            while row >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            images = file.read_row_group(group, columns=["image"])["image"]
            if row - first >= len(images):
                raise LookupError(f"its row group {group} has fewer rows than the footer says")
            return first, pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
    except (pa.ArrowException, LookupError, ValueError, MemoryError) as error:  # the file is another one than was listed
        raise OSError(f"{uri}: row {row} cannot be read: {error}") from error
