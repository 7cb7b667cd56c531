"""Listing the images of an outside source: a folder, tar files, or Parquet files of bytes."""

import json
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from cluster.artifacts import filesystem
from cluster.errors import UserError
from mining.config import GalleryConfig

INDEX = pa.schema([("key", pa.string()), ("uri", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LISTED_ROWS = 8192  # rows that are Python objects at a time
_TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_Row = tuple[str, str, int, int]
_Image = tuple[str | None, int, int]  # name, offset, length


def list_images(config: GalleryConfig, field: str) -> tuple[pa.Table, list[dict[str, str]]]:
    """Index of a gallery's images, sorted by key, and the rejects: files that cannot be read, names without an image, and
    second uses of a name.

    Raises UserError when the source is missing or holds no image, or a Parquet file has other columns. A key is the path
    inside the source without suffix.
    """
    names = {name: path for file in config.splits for name, path in _read_names(file).items()} if config.splits else None
    split = ", ".join(config.splits)
    rejects: list[dict[str, str]] = []
    rows = _table(_listed(config.images, names, field, rejects))
    if not len(rows):
        wrong = "".join(f"; {row['key']} is {row['reason']}: {row['detail']}" for row in rejects[:1])
        raise UserError(f"{field}: no image found in {config.images}" + (f" for the names of {split}" if names else "") + wrong)
    first = _first_of_its_key(rows["key"])
    again = np.flatnonzero(first != np.arange(len(rows)))
    rejects += [
        reject(row["key"], "duplicate_name", f"{row['uri']} has the name of {kept['uri']}")
        for row, kept in zip(rows.take(again).to_pylist(), rows.take(first[again]).to_pylist(), strict=True)
    ]
    known = set(rows["key"].to_pylist()) if names else set()
    rejects += [reject(name, "missing_image", f"named in {split}") for name in names or () if name not in known]
    return rows.filter(pa.array(first == np.arange(len(rows)))) if len(again) else rows, rejects


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
        system, path = filesystem(file)
        with system.open_input_file(path) as stream:
            return json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error


def _read_names(file: str) -> dict[str, str | None]:
    """Names of a split file, each with its path where the file gives one."""
    content = read_json(file)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return dict.fromkeys(content)
    if isinstance(content, dict) and all(isinstance(path, str) for path in content.values()):
        return dict(content)
    raise UserError(f"{file}: expected a list of names, or an object that maps each name to its path")


def reject(key: str, reason: str, detail: str) -> dict[str, str]:
    """A row of the rejects of ingest."""
    return {"key": key, "stage": "ingest", "reason": reason, "detail": detail[:200]}


def _listed(uri: str, names: dict[str, str | None] | None, field: str, rejects: list[dict[str, str]]) -> Iterator[_Row]:
    """Rows of the images of a source, of these names alone where they are given; adds to `rejects` what cannot be read."""
    system, base = filesystem(uri)
    info = system.get_file_info(base)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{field}: {uri} does not exist; give a folder of images, or tar or Parquet files")
    files = [info] if info.is_file else system.get_file_info(pafs.FileSelector(base, recursive=True))
    folder = PurePosixPath(base).parent if info.is_file else PurePosixPath(base)
    by_path = {path.removeprefix("./"): name for name, path in (names or {}).items() if path}
    for file in files:
        path = PurePosixPath(file.path)
        if file.is_file:
            relative = str(path.relative_to(folder))
            for key, offset, length in _images_in(system, path, relative, file.size, rejects):
                if key is None:
                    rejects.append(reject(f"{relative} row {offset}", "no_key", "its key is null"))
                    continue
                name = by_path.get(key, str(PurePosixPath(key).with_suffix("")) if _has_image_suffix(key) else key)
                if names is None or name in names:
                    yield name, _location(file.path, uri, base), offset, length


def _location(path: str, source: str, base: str) -> str:
    """Where a file of a source is: an absolute path, or a URI with the source's scheme and query."""
    if "://" not in source:
        return path
    parts = urlsplit(source)
    return parts._replace(path=parts.path.rstrip("/") + quote(path.removeprefix(base))).geturl()


def _images_in(
    system: pafs.FileSystem, path: PurePosixPath, relative: str, size: int, rejects: list[dict[str, str]]
) -> Iterator[_Image]:
    """The images of one file: itself, a tar's members, or a Parquet file's rows."""
    if path.suffix in _CONTAINERS:
        with system.open_input_file(str(path)) as stream:  # one that cannot be opened may be there the next time: no reject
            try:
                yield from _CONTAINERS[path.suffix](stream, str(path))
            except (OSError, pa.ArrowException, tarfile.TarError) as error:
                rejects.append(reject(relative, "unreadable", str(error).strip()))
    elif _has_image_suffix(relative):
        yield relative, 0, size


def _members(stream: pa.NativeFile, path: str) -> Iterator[_Image]:
    """Images of a tar file. Raises TarError where it is broken."""
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
            if member.isfile() and _has_image_suffix(member.name):
                yield member.name, member.offset_data, member.size
        if stream.read_at(tarfile.BLOCKSIZE, archive.offset).strip(tarfile.NUL):  # tarfile takes a broken header for the end
            raise tarfile.ReadError(f"the header at byte {archive.offset} is broken")


def _rows(stream: pa.NativeFile, path: str) -> Iterator[_Image]:
    """Images of a Parquet file. Raises UserError when it has other columns, ArrowException or OSError where it is broken."""
    file = pq.ParquetFile(stream)
    _check_columns(file.schema_arrow, path)
    groups, rows = (file.metadata.row_group(i) for i in range(file.num_row_groups)), max(file.metadata.num_rows, 1)
    length = sum(group.total_byte_size for group in groups) // rows  # the mean: the file does not list each one's
    keys = (key for block in file.iter_batches(LISTED_ROWS, columns=["key"]) for key in block["key"].to_pylist())
    yield from ((key, row, length) for row, key in enumerate(keys))


def _check_columns(schema: pa.Schema, path: str) -> None:
    found = {field.name: field.type for field in schema}
    key, image = (found.get(name, pa.null()) for name in ("key", "image"))
    if pa.types.is_struct(image):
        image = next((field.type for field in image if field.name == "bytes"), pa.null())
    if key not in _TEXT or image not in _BYTES:
        columns = ", ".join(f"{name} ({kind})" for name, kind in found.items())
        raise UserError(
            f"{path}: has the columns {columns}; give it `key`, the image's name as a string, and `image`, its encoded bytes "
            "or a struct with them as `bytes`"
        )


_CONTAINERS: dict[str, Callable[[pa.NativeFile, str], Iterator[_Image]]] = {".tar": _members, ".parquet": _rows}


def _has_image_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


class BytesReader:
    """Reads encoded images by (uri, offset, length); keeps the Parquet row group it read last."""

    def __init__(self) -> None:
        self._group: tuple[str, int, pa.ChunkedArray] | None = None  # uri, first row, images

    def read(self, uri: str, offset: int, length: int) -> bytes:
        """Encoded bytes of one image. Raises OSError when they cannot be read."""
        system, path = filesystem(uri)
        if path.endswith(".parquet"):
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
            return first, pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
    except (pa.ArrowException, LookupError) as error:  # the file is another one than was listed
        raise OSError(f"{uri}: row {row} cannot be read: {error}") from error
