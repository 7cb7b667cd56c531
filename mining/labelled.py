"""Labelled triplets and captions, checked row by row in the terms that the field's files use."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, ValidationError, field_validator

from cluster.errors import Rejected
from cluster.files import is_text
from mining import tables
from mining.images import without_suffix
from mining.rows import read_caption_rows, read_rows, strings
from mining.sources import normal, reject

_Row = dict[str, Any]
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
            raise Rejected("empty_caption", "the row has no text")
        return {"image_id": image_id, "caption": text}

    return _accepted(read_caption_rows(file), row)


def _accepted(entries: Iterable[Any], make: Callable[[_Row, str], _Row]) -> tuple[list[_Row], list[_Row]]:
    """What `make` gives for each row and its name, and the rows that it rejects."""
    rows, rejects = [], []
    for position, entry in enumerate(entries):
        name = f"row {position}"
        try:
            given = _given(entry)
            name = str(given.get("pairid", name))
            if bad := next((text for text in strings(given) if not is_text(text)), None):
                raise Rejected("not_utf8", f"{bad[:80]!r} is not valid Unicode")
            rows.append(make(given, name))
        except Rejected as error:
            rejects.append(reject(name, error.reason, error.detail))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            rejects.append(reject(name, "malformed_row", f"{place}: {first['msg']}"))
    return rows, rejects


def _given(entry: Any) -> _Row:
    """The fields that a row gives. Raises Rejected when it is no row."""
    if isinstance(entry, Rejected):
        raise entry
    if not isinstance(entry, dict) or not all(isinstance(field, str) for field in entry):
        raise Rejected("malformed_row", f"found {str(entry)[:80]}, expected named fields")
    return {field: value for field, value in entry.items() if value is not None and value == value}  # a table has every field


def _found(name: str, known: Mapping[str, int]) -> int | None:
    """The id of an image by its key or its path, in whichever of Unicode's forms."""
    path = str(PurePosixPath(name))
    names = (name, path, without_suffix(path))
    forms = (form for name in names for form in (name, normal(name), unicodedata.normalize("NFD", name)))
    return next((known[form] for form in forms if form in known), None)


def _known(key: str, role: str, known: Mapping[str, int]) -> int:
    if (image_id := _found(key, known)) is None:
        raise Rejected("unknown_image", f"{role} {key!r} is not in the gallery")
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
        """Raises Rejected or ValidationError when the row is rejected."""
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
            raise Rejected("same_image", "the reference is the target")
        if not row["deltas"]:
            raise Rejected("empty_delta", "the row has no text")
        if triplet_id in self._ids:
            raise Rejected("duplicate_name", f"an earlier row has the pairid {name}")
        if triplet.group is not None and triplet.members:
            if not {triplet.reference, triplet.target} <= set(triplet.members):
                raise Rejected("malformed_row", "the members of its group lack the reference or the target")
            if self.members.setdefault(triplet.group, triplet.members) != triplet.members:
                raise Rejected("malformed_row", "an earlier row lists other members of its group")
        self._ids.add(triplet_id)
        return row
