"""Labelled files: triplets and captions in the forms that the field uses, checked row by row."""

import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import AliasChoices, AliasPath, BaseModel, Field, ValidationError, field_validator

from cluster.artifacts import filesystem
from cluster.errors import UserError
from mining import tables
from mining.images import BadImage
from mining.sources import IMAGE_SUFFIXES, read_json, reject

_Row = dict[str, Any]


def read_triplets(file: str, known: Mapping[str, int]) -> tuple[list[_Row], list[_Row], list[_Row]]:
    """Triplets, groups and rejects of a file over the images of `known` (key -> id).

    Rejects are malformed_row, unknown_image, empty_delta and duplicate_name (a second use of a pairid). A group with an
    image that is not in the gallery is an incomplete_group: ranking its targets among fewer images would be easier than
    the benchmark. Its triplets stay and have no rank inside the group. Raises UserError when the file cannot be read.
    """
    maker = _TripletMaker(file.rsplit("/", 1)[-1], known)
    triplets, rejects = _accepted(read_rows(file), maker.row)
    groups = []
    for group, members in maker.members.items():
        if missing := [key for key in members if key not in known]:
            rejects.append(reject(f"group {group}", "incomplete_group", f"{missing[0]!r} is not in the gallery"))
        else:
            groups.append({"group_id": _group_id(group), "image_ids": [known[key] for key in members]})
    return triplets, groups, rejects


def read_captions(file: str, known: Mapping[str, int], until: str | None) -> tuple[list[_Row], list[_Row]]:
    """Captions, cut before `until`, and rejects (malformed_row, unknown_image, empty_caption) of a file or folder.

    `known` maps a key to its image's id; a row may name an image by its key or by its path, as LLaVA's do. Raises UserError
    when the file cannot be read.
    """

    def row(entry: _Row, name: str) -> _Row:
        pair = _Caption.model_validate(entry)
        text = (pair.text().split(until)[0] if until else pair.text()).strip()
        image_id = _known(pair.image if pair.image in known else _without_suffix(pair.image), "image", known)
        if not text:
            raise BadImage("empty_caption", "the row has no text")
        return {"image_id": image_id, "caption": text}

    return _accepted(_caption_rows(file), row)


def _without_suffix(path: str) -> str:
    image = PurePosixPath(path)
    return str(image.with_suffix("")) if image.suffix.lower() in IMAGE_SUFFIXES else path


def _caption_rows(file: str) -> list[_Row]:
    """Rows of an image's key or path and its caption, whichever of the forms they come in."""
    system, path = filesystem(file)
    if system.get_file_info(path).type == pafs.FileType.Directory:
        infos = system.get_file_info(pafs.FileSelector(path, recursive=True))
        names = sorted(info.path for info in infos if info.is_file and info.extension in ("tar", "parquet"))
        if not names:
            raise UserError(f"{file}: the folder has no tar or Parquet file of captions")
        return [row for name in names for row in _rows_in(system, name)]
    return read_rows(file) if path.endswith(".json") else _rows_in(system, path)


def _rows_in(system: pafs.FileSystem, path: str) -> list[_Row]:
    try:
        with system.open_input_file(path) as stream:
            return _tar_rows(stream) if path.endswith(".tar") else _parquet_rows(pq.ParquetFile(stream))
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as captions: {error}; give a JSON, Parquet or tar file") from error


def _parquet_rows(file: pq.ParquetFile) -> list[_Row]:
    """Rows of image and caption; where there is a `key`, it names the image, and `image` is its bytes, which are not read."""
    names = file.schema_arrow.names
    name = "key" if "key" in names else "image"
    if not {name, "caption"} <= set(names):
        raise ValueError(f"expected the columns image (or key) and caption, found {names}")
    return file.read(columns=[name, "caption"]).rename_columns({name: "image"}).to_pylist()


def _tar_rows(stream: Any) -> list[_Row]:
    """A WebDataset's rows: a member without its suffix is the key, its .txt (else its .json's "caption") the caption."""
    texts: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:  # one pass, whatever the store
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.suffix not in (".txt", ".json"):
                continue
            key, content = str(path.with_suffix("")), archive.extractfile(member)
            assert content is not None  # of a file
            if path.suffix == ".txt":
                texts[key] = content.read().decode(errors="replace")
            else:
                texts.setdefault(key, _json_caption(content.read()))
    return [{"image": key, "caption": text} for key, text in texts.items()]


def _json_caption(content: bytes) -> str:
    """The caption of a WebDataset's JSON; empty where it has none, so that its row is rejected."""
    try:
        caption = json.loads(content)["caption"]
    except (ValueError, KeyError, TypeError):
        return ""
    return caption if isinstance(caption, str) else ""


def _accepted(entries: Iterable[_Row], make: Callable[[_Row, str], _Row]) -> tuple[list[_Row], list[_Row]]:
    """What `make` gives for each row and its name, and the rows that it rejects."""
    rows, rejects = [], []
    for position, entry in enumerate(entries):
        given = {field: value for field, value in entry.items() if value is not None}  # a Parquet row has every field
        name = str(given.get("pairid", f"row {position}"))
        try:
            rows.append(make(given, name))
        except BadImage as error:
            rejects.append(reject(name, error.reason, error.detail))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            rejects.append(reject(name, "malformed_row", f"{place}: {first['msg']}"))
    return rows, rejects


def read_rows(file: str) -> list[_Row]:
    """Rows of a JSON list or a Parquet file. Raises UserError naming the file when it is neither."""
    content = _read_parquet(file) if file.endswith(".parquet") else read_json(file)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f"{file}: expected a list of rows such as {{'reference': ..., 'target': ..., 'captions': [...]}}")
    return content


def _read_parquet(file: str) -> list[_Row]:
    try:
        system, path = filesystem(file)
        with system.open_input_file(path) as stream:
            return pq.read_table(stream).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a Parquet table: {error}") from error


def _group_id(group: str) -> int:
    return tables.stable_id("group", group)


def _known(key: str, role: str, known: Mapping[str, int]) -> int:
    if key not in known:
        raise BadImage("unknown_image", f"{role} {key!r} is not in the gallery")
    return known[key]


class _Turn(BaseModel):
    speaker: str = Field(validation_alias="from")
    value: str


class _Caption(BaseModel):
    """A row with a caption, or LLaVA's with a conversation about the image."""

    image: str
    caption: str = ""
    conversations: list[_Turn] = []

    def text(self) -> str:
        """The caption: in a conversation what the model is to say first."""
        return self.caption or next((turn.value for turn in self.conversations if turn.speaker == "gpt"), "")


class _Triplet(BaseModel):
    """A row in the terms of any of the field's files: FashionIQ's `candidate`, CIRR's `target_hard` and `img_set`."""

    reference: str = Field(validation_alias=AliasChoices("reference", "candidate"))
    target: str = Field(validation_alias=AliasChoices("target", "target_hard"))
    captions: list[str | None] = Field([], validation_alias=AliasChoices("captions", "caption"))
    group: str | None = Field(
        None, validation_alias=AliasChoices("group", AliasPath("img_set", "id")), coerce_numbers_to_str=True
    )
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

    def __init__(self, file: str, known: Mapping[str, int]) -> None:
        self.file, self.known = file, known
        self.members: dict[str, list[str]] = {}
        self._ids: set[int] = set()

    def row(self, entry: _Row, name: str) -> _Row:
        """Raises BadImage or ValidationError when the row is rejected."""
        triplet, triplet_id = _Triplet.model_validate(entry), tables.stable_id(self.file, name)
        row = {
            "triplet_id": triplet_id,
            "group_id": None if triplet.group is None else _group_id(triplet.group),
            "reference_id": _known(triplet.reference, "reference", self.known),
            "target_id": _known(triplet.target, "target", self.known),
            "deltas": triplet.deltas(),
            "source": "human",
        }
        if not row["deltas"]:
            raise BadImage("empty_delta", "the row has no text")
        if triplet_id in self._ids:
            raise BadImage("duplicate_name", f"an earlier row has the pairid {name}")
        if triplet.group is not None and triplet.members:
            self._keep_members(triplet.group, triplet)
        self._ids.add(triplet_id)
        return row

    def _keep_members(self, group: str, triplet: _Triplet) -> None:
        if not {triplet.reference, triplet.target} <= set(triplet.members):
            raise BadImage("malformed_row", "the members of its group lack the reference or the target")
        if self.members.setdefault(group, triplet.members) != triplet.members:
            raise BadImage("malformed_row", "an earlier row lists other members of its group")
