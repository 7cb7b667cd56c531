"""Rows of labelled files, in whichever of the field's forms: JSON, JSON lines, CSV, Parquet, and a WebDataset's tar."""

import ast
import codecs
import csv
import io
import json
import tarfile
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from cluster.artifacts import filesystem
from cluster.errors import Rejected, UserError, shown
from cluster.files import File, files_below, is_hidden, is_text
from mining.sources import is_textual, read_file, read_json, texts
from mining.tars import CAPTION_SUFFIXES, naming, read_members, resolve

_Row = dict[str, Any]
csv.field_size_limit(2**31 - 1)  # a long caption is a caption, not the end of its file
_BROKEN = (OSError, ValueError, MemoryError, OverflowError, pa.ArrowException, tarfile.TarError)


def read_rows(file: str) -> list[Any]:
    """Rows of a JSON list, JSON lines, CSV or Parquet. Raises UserError naming the file when it is none of these.

    A line that cannot be read is a Rejected in its row's place.
    """
    suffix = PurePosixPath(file).suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(file)
    if suffix in (".csv", ".tsv"):
        return _read_csv(file)
    if suffix in (".jsonl", ".ndjson"):
        return _read_lines(read_file(file, "JSON lines"))
    try:
        content = read_json(file)
    except UserError:
        rows = _read_lines(read_file(file, "JSON lines"))  # JSON lines are often called .json
        if not all(isinstance(row, dict) for row in rows[:2]) or len(rows) < 2:
            raise
        return rows
    if not isinstance(content, list):
        raise UserError(f"{file}: expected a list of rows such as {{'reference': ..., 'target': ..., 'captions': [...]}}")
    return content


def _read_lines(content: bytes) -> list[Any]:
    return [_line(line) for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected("malformed_row", f"the line is no JSON: {str(error)[:120]}")


def _read_csv(file: str) -> list[Any]:
    """Rows of a CSV file, whichever of comma, semicolon and tab stands between its cells; empty cells are absent."""
    text = read_file(file, "CSV").decode("utf-8-sig", "surrogateescape").lstrip("\r\n")
    header, source = text.partition("\n")[0], io.StringIO(text, newline="")
    lines = csv.DictReader(source, delimiter=max(",;\t", key=header.count), skipinitialspace=True, strict=True)
    try:
        _check_once(lines.fieldnames or ())
    except (csv.Error, ValueError) as error:
        raise UserError(f"{file}: cannot be read as CSV: {error}") from error
    if not {"reference", "candidate", "image", "key"} & set(lines.fieldnames or ()):
        found = str(lines.fieldnames)[:200]
        raise UserError(
            f"{file}: cannot be read as captions or triplets: found the columns {found}, expected reference, target "
            "and caption, or image and caption"
        )
    return list(_lines(lines))


def _lines(lines: "csv.DictReader[str]") -> Iterator[Any]:
    """Rows; what a quote that is not closed swallows is one reject."""
    while True:
        try:
            yield _cells(next(lines))
        except StopIteration:
            return
        except csv.Error as error:
            yield Rejected("malformed_row", f"up to line {lines.reader.line_num}: {error}")


def _cells(row: dict[Any, Any]) -> Any:
    if None in row:
        return Rejected("malformed_row", "the row has more cells than the header")
    return {field: _cell(value) for field, value in row.items() if value}


def _cell(value: str) -> Any:
    """A list or an object where a cell holds one, as JSON or as Python, pandas and NumPy write it."""
    if value[0] not in "[{":
        return value
    for read in (json.loads, _literal):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
    return value


def _literal(text: str) -> Any:
    """NumPy puts nothing between an array's texts, which Python would join to one."""
    tokens, between = list(tokenize.generate_tokens(io.StringIO(text).readline)), list[str]()
    said = [token for token in tokens if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)]
    for token, following in pairwise([*said, tokens[-1]]):
        between += [token.string, ", " if token.type == following.type == tokenize.STRING else " "]
    return ast.literal_eval("".join(between))


def _read_parquet(file: str) -> list[_Row]:
    try:
        system, path = filesystem(file)
        with system.open_input_file(path) as stream:
            table = pq.ParquetFile(stream).read()
        _check_once(table.column_names)
        columns = {name: _values(table[name]) for name in table.column_names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except _BROKEN as error:
        raise UserError(f"{file}: cannot be read as a Parquet table: {error}") from error


def read_caption_rows(file: str) -> list[Any]:
    """Rows of an image's key or path and its caption, whichever of the forms they come in."""
    try:
        system, path = filesystem(file)
        is_folder = system.get_file_info(path).type == pafs.FileType.Directory
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as captions: {error}") from error
    if is_folder:
        found = (below for below in files_below(system, path) if not below.aside and not is_hidden(below.relative))
        files = sorted((below for below in found if _is_container(below.path)), key=lambda below: below.path)
        if not files:
            raise UserError(f"{file}: the folder has no tar or Parquet file of captions")
        return [row for below in files for row in _rows_or_reject(system, below)]
    return _rows_in(system, path) if _is_container(path) else read_rows(file)


def _is_container(path: str) -> bool:
    return path.lower().endswith((".tar", ".parquet"))


def _rows_or_reject(system: pafs.FileSystem, file: File) -> list[Any]:
    """Of a folder's file: one that cannot be read is a reject, and the others are still good."""
    if file.broken or not is_text(file.path):
        return [Rejected("unreadable", f"{file.relative}: {file.broken or 'the name is not UTF-8'}")]
    try:
        return _rows_in(system, file.path)
    except UserError as error:
        return [Rejected("unreadable", str(error))]


def _rows_in(system: pafs.FileSystem, path: str) -> list[_Row]:
    try:
        with system.open_input_file(path) as stream:
            return _tar_rows(stream) if path.lower().endswith(".tar") else _parquet_rows(pq.ParquetFile(stream))
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read as captions: {error}; give a JSON, CSV, Parquet or tar file") from error


def _parquet_rows(file: pq.ParquetFile) -> list[_Row]:
    """Rows of image and caption; where there is a `key`, it names the image, and `image` is its bytes, which are not read."""
    schema = file.schema_arrow
    _check_once(schema.names)
    image = "key" if "key" in schema.names else "image"
    caption = "caption" if "caption" in schema.names else "text"
    if not {image, caption} <= set(schema.names):
        raise ValueError(f"expected the columns image (or key) and caption (or text), found {schema.names}")
    if pa.types.is_struct(kind := schema.field(image).type):
        if kind.get_field_index("path") < 0:
            raise ValueError(f"expected the image's name as its path, found {kind}")
        image = f"{image}.path"
    named, said = (_values(file.read(columns=[column]).column(0)) for column in (image, caption))
    names = (value["path"] if isinstance(value, dict) else value for value in named)
    return [{"image": name, "caption": text} for name, text in zip(names, said, strict=True)]


def _check_once(names: Sequence[str]) -> None:
    """Raises ValueError where a column comes twice: one of both would be lost."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the column {shown(twice[0])!r} comes twice")


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Of a column: texts that are not UTF-8 hold surrogates, which rejects their row alone."""
    kind = column.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_textual(kind.value_type):
        inner, lengths = iter(_values(pc.list_flatten(column))), pc.list_value_length(column).to_pylist()
        return [None if length is None else list(islice(inner, length)) for length in lengths]
    return texts(column) if is_textual(kind) and not pa.types.is_integer(kind) else column.to_pylist()


def _tar_rows(stream: Any) -> list[Any]:
    """A WebDataset's rows: a member's key names the image, its .txt (else its .json's "caption" or "text") is the caption."""
    found = read_members(stream)
    linked, _ = resolve(found)
    members = [(name, offset, size) for name, offset, size in [*found.files, *linked] if not is_hidden(name)]
    key_of, captions = naming(name for name, _, _ in members), dict[str, str]()
    for name, offset, size in members:
        if (suffix := PurePosixPath(name).suffix.lower()) in CAPTION_SUFFIXES:
            content = stream.read_at(size, offset)
            if suffix == ".txt":
                captions[key_of(name)] = content.decode("utf-8-sig", "surrogateescape")
            else:
                captions.setdefault(key_of(name), _json_caption(content))
    rows: list[Any] = [{"image": key, "caption": text} for key, text in captions.items()]
    rows += [Rejected("unreadable", f"{name}: {why}") for name, why in found.broken]
    if found.error and not rows:
        raise ValueError(found.error)
    return rows + ([Rejected("unreadable", found.error)] if found.error else [])


def _json_caption(content: bytes) -> str:
    """The caption of a WebDataset's JSON; empty where it has none, so that its row is rejected."""
    try:
        row = json.loads(content)
        caption = row.get("caption") or row.get("text")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return caption if isinstance(caption, str) else ""


def strings(node: Any) -> Iterator[str]:
    """Every text in rows."""
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict | list):
            nodes.extend([*node, *node.values()] if isinstance(node, dict) else node)
