"""Labelled files: triplets and captions in the forms that the field uses, checked row by row."""

import ast
import codecs
import csv
import io
import json
import tarfile
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, ValidationError, field_validator

from cluster.artifacts import filesystem
from cluster.errors import UserError, shown
from cluster.files import File, files_below, is_hidden, is_text
from mining import tables
from mining.images import BadImage, without_suffix
from mining.sources import is_textual, normal, read_file, read_json, reject, texts
from mining.tars import CAPTION_SUFFIXES, naming, read_members, resolve

_Row = dict[str, Any]
csv.field_size_limit(2**31 - 1)  # a long caption is a caption, not the end of its file
_BROKEN = (OSError, ValueError, MemoryError, OverflowError, pa.ArrowException, tarfile.TarError)
_ENDS = ".?, "  # of a caption, where it becomes part of a longer text
Text = Annotated[str, Field(coerce_numbers_to_str=False, strict=True)]  # a number is no caption


def joined(captions: Sequence[str]) -> str:
    """Two captions in one text, as FashionIQ's evaluation and its literature join them."""
    first, second = (caption.strip(_ENDS) for caption in captions)
    return f"{first.capitalize()} and {second}"


def joined_both_ways(captions: Sequence[str]) -> list[str]:
    """What FashionIQ's literature draws from in training: both captions joined, in either order, and each alone.

    Of any other number each stands alone; one that is punctuation alone is none.
    """
    texts = [text for caption in captions if (text := caption.strip(_ENDS))]
    pair = [joined(texts), joined(texts[::-1])] if len(texts) == 2 else []
    return pair + [text.capitalize() for text in texts]


def read_triplets(file: str, known: Mapping[str, int], join: bool = False) -> tuple[list[_Row], list[_Row], list[_Row]]:
    """Triplets, groups and rejects of a file over the images of `known` (key -> id); `join` as in the config.

    Rejects are malformed_row, not_utf8, unknown_image, same_image, empty_delta and duplicate_name (a second pairid). A
    group with an image that is not in the gallery is an incomplete_group: ranking its targets among fewer images would be
    easier than the benchmark. Its triplets stay and have no rank inside the group. Raises UserError when the file cannot
    be read.
    """
    maker = _TripletMaker(file.rsplit("/", 1)[-1], known, join)
    triplets, rejects = _accepted(read_rows(file), maker.row)
    groups = []
    for group, members in maker.members.items():
        if missing := [key for key in members if _found(key, known) is None]:
            rejects.append(reject(f"group {group}", "incomplete_group", f"{missing[0]!r} is not in the gallery"))
        else:
            image_ids = [_known(key, "member", known) for key in members]
            groups.append({"group_id": tables.stable_id("group", group), "image_ids": image_ids})
    return triplets, groups, rejects


def read_captions(file: str, known: Mapping[str, int], until: str | None) -> tuple[list[_Row], list[_Row]]:
    """Captions, cut before `until`, and rejects (malformed_row, unknown_image, empty_caption) of a file or folder.

    `known` maps a key to its image's id; a row may name an image by its key or by its path, as LLaVA's do. Raises UserError
    when the file cannot be read.
    """

    def row(entry: _Row, name: str) -> _Row:
        pair = _Caption.model_validate(entry)
        text = (pair.text().split(until)[0] if until else pair.text()).strip()
        image_id = _known(pair.image, "image", known)
        if not text:
            raise BadImage("empty_caption", "the row has no text")
        return {"image_id": image_id, "caption": text}

    return _accepted(_caption_rows(file), row)


def _caption_rows(file: str) -> list[Any]:
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
        return [BadImage("unreadable", f"{file.relative}: {file.broken or 'the name is not UTF-8'}")]
    try:
        return _rows_in(system, file.path)
    except UserError as error:
        return [BadImage("unreadable", str(error))]


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
    rows += [BadImage("unreadable", f"{name}: {why}") for name, why in found.broken]
    if found.error and not rows:
        raise ValueError(found.error)
    return rows + ([BadImage("unreadable", found.error)] if found.error else [])


def _json_caption(content: bytes) -> str:
    """The caption of a WebDataset's JSON; empty where it has none, so that its row is rejected."""
    try:
        row = json.loads(content)
        caption = row.get("caption") or row.get("text")
    except (ValueError, AttributeError, RecursionError):
        return ""
    return caption if isinstance(caption, str) else ""


def _accepted(entries: Iterable[Any], make: Callable[[_Row, str], _Row]) -> tuple[list[_Row], list[_Row]]:
    """What `make` gives for each row and its name, and the rows that it rejects."""
    rows, rejects = [], []
    for position, entry in enumerate(entries):
        name = f"row {position}"
        try:
            given = _given(entry)
            name = str(given.get("pairid", name))
            if bad := next((text for text in strings(given) if not is_text(text)), None):
                raise BadImage("not_utf8", f"{bad[:80]!r} is not valid Unicode")
            rows.append(make(given, name))
        except BadImage as error:
            rejects.append(reject(name, error.reason, error.detail))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            rejects.append(reject(name, "malformed_row", f"{place}: {first['msg']}"))
    return rows, rejects


def _given(entry: Any) -> _Row:
    """The fields that a row gives. Raises BadImage when it is no row."""
    if isinstance(entry, BadImage):
        raise entry
    if not isinstance(entry, dict) or not all(isinstance(field, str) for field in entry):
        raise BadImage("malformed_row", f"found {str(entry)[:80]}, expected named fields")
    return {field: value for field, value in entry.items() if value is not None and value == value}  # a table has every field


def strings(node: Any) -> Iterator[str]:
    """Every text in rows."""
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict | list):
            nodes.extend([*node, *node.values()] if isinstance(node, dict) else node)


def read_rows(file: str) -> list[Any]:
    """Rows of a JSON list, JSON lines, CSV or Parquet. Raises UserError naming the file when it is none of these.

    A line that cannot be read is a BadImage in its row's place.
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
        return BadImage("malformed_row", f"the line is no JSON: {str(error)[:120]}")


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
            yield BadImage("malformed_row", f"up to line {lines.reader.line_num}: {error}")


def _cells(row: dict[Any, Any]) -> Any:
    if None in row:
        return BadImage("malformed_row", "the row has more cells than the header")
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


def _found(name: str, known: Mapping[str, int]) -> int | None:
    """The id of an image by its key or its path, in whichever of Unicode's forms."""
    path = str(PurePosixPath(name))
    names = (name, path, without_suffix(path))
    forms = (form for name in names for form in (name, normal(name), unicodedata.normalize("NFD", name)))
    return next((known[form] for form in forms if form in known), None)


def _known(key: str, role: str, known: Mapping[str, int]) -> int:
    if (image_id := _found(key, known)) is None:
        raise BadImage("unknown_image", f"{role} {key!r} is not in the gallery")
    return image_id


class _Turn(BaseModel):
    speaker: str = Field(validation_alias="from")
    value: str


class _Caption(BaseModel):
    """A row with a caption, or LLaVA's with a conversation about the image."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    image: str = Field(validation_alias=AliasChoices("image", "key"))
    caption: Text = Field("", validation_alias=AliasChoices("caption", "text"))
    conversations: list[_Turn] = []

    def text(self) -> str:
        """The caption: in a conversation what the model is to say first."""
        return self.caption or next((turn.value for turn in self.conversations if turn.speaker == "gpt"), "")


class _Triplet(BaseModel):
    """A row in the terms of any of the field's files: FashionIQ's `candidate`, CIRR's `target_hard` and `img_set`."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    reference: str = Field(validation_alias=AliasChoices("reference", "candidate"))
    target: str = Field(validation_alias=AliasChoices("target", "target_hard"))
    captions: list[Text | None] = Field([], validation_alias=AliasChoices("captions", "caption", "text"))
    author: str | None = None
    group: str | None = Field(None, validation_alias=AliasChoices("group", AliasPath("img_set", "id")))
    members: list[str] = Field([], validation_alias=AliasPath("img_set", "members"))

    @field_validator("captions", mode="before")
    @classmethod
    def _one_or_several(cls, captions: Any) -> Any:
        return [captions] if isinstance(captions, str) else captions

    @field_validator("members")
    @classmethod
    def _in_order(cls, members: list[str]) -> list[str]:
        return sorted(set(members))

    def deltas(self) -> list[str]:
        """Its texts, without empty ones."""
        return [text.strip() for text in self.captions if text and text.strip()]


class _TripletMaker:
    """Makes rows of the triplets table, and keeps the members of the groups that they list."""

    def __init__(self, file: str, known: Mapping[str, int], join: bool) -> None:
        self.file, self.known, self.join = file, known, join
        self.members: dict[str, list[str]] = {}
        self._ids: set[int] = set()

    def row(self, entry: _Row, name: str) -> _Row:
        """Raises BadImage or ValidationError when the row is rejected."""
        triplet, triplet_id = _Triplet.model_validate(entry), tables.stable_id(self.file, name)
        row = {
            "triplet_id": triplet_id,
            "group_id": None if triplet.group is None else tables.stable_id("group", triplet.group),
            "reference_id": _known(triplet.reference, "reference", self.known),
            "target_id": _known(triplet.target, "target", self.known),
            "deltas": joined_both_ways(triplet.deltas()) if self.join else triplet.deltas(),
            "source": "human",
            "author": triplet.author,  # counted, and no column of the table
        }
        if row["reference_id"] == row["target_id"]:
            raise BadImage("same_image", "the reference is the target")
        if not row["deltas"]:
            raise BadImage("empty_delta", "the row has no text")
        if triplet_id in self._ids:
            raise BadImage("duplicate_name", f"an earlier row has the pairid {name}")
        if triplet.group is not None and triplet.members:
            if not {triplet.reference, triplet.target} <= set(triplet.members):
                raise BadImage("malformed_row", "the members of its group lack the reference or the target")
            if self.members.setdefault(triplet.group, triplet.members) != triplet.members:
                raise BadImage("malformed_row", "an earlier row lists other members of its group")
        self._ids.add(triplet_id)
        return row
