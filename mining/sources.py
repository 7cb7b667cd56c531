"""Listing the images of an outside source: a folder, tar files, or Parquet files of bytes."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from cluster.artifacts import filesystem
from cluster.errors import UserError
from mining.config import GalleryConfig

INDEX = pa.schema([("key", pa.string()), ("uri", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_Row = tuple[str, str, int, int]


def list_images(config: GalleryConfig, field: str) -> tuple[pa.Table, list[dict[str, str]]]:
    """Index of a gallery's images, sorted by key, and the rejects: names without an image, and second uses of a name.

    Raises UserError when the source is missing or holds no image. A key is the path inside the source without suffix.
    """
    names = {name: path for file in config.splits for name, path in _read_names(file).items()} if config.splits else None
    split = ", ".join(config.splits)
    rows = sorted(_listed(config.images, names, field))
    if not rows:
        raise UserError(f"{field}: no image found in {config.images}" + (f" for the names of {split}" if names else ""))
    kept: dict[str, _Row] = {}
    rejects = []
    for row in rows:
        if row[0] in kept:
            rejects.append(reject(row[0], "duplicate_name", f"{row[1]} has the name of {kept[row[0]][1]}"))
        else:
            kept[row[0]] = row
    rejects += [reject(name, "missing_image", f"named in {split}") for name in names or () if name not in kept]
    columns = zip(*kept.values(), strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX, strict=True)], schema=INDEX), rejects


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


def _listed(uri: str, names: dict[str, str | None] | None, field: str) -> Iterator[_Row]:
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
            for key, offset, length in _images_in(system, path, str(path.relative_to(folder)), file.size):
                name = by_path.get(key, str(PurePosixPath(key).with_suffix("")) if _has_image_suffix(key) else key)
                if names is None or name in names:
                    yield name, _location(file.path, uri, base), offset, length


def _location(path: str, source: str, base: str) -> str:
    """Where a file of a source is: an absolute path, or a URI with the source's scheme and query."""
    if "://" not in source:
        return path
    parts = urlsplit(source)
    return parts._replace(path=parts.path.rstrip("/") + quote(path.removeprefix(base))).geturl()


def _images_in(system: pafs.FileSystem, path: PurePosixPath, relative: str, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of the images of one file: itself, a tar's members, or a Parquet file's rows."""
    if path.suffix == ".parquet":
        with system.open_input_file(str(path)) as stream:
            keys = pq.read_table(stream, columns=["key"])["key"].to_pylist()
        yield from ((key, row, 0) for row, key in enumerate(keys))
    elif path.suffix == ".tar":
        with system.open_input_file(str(path)) as stream, tarfile.open(fileobj=stream) as archive:
            yield from ((m.name, m.offset_data, m.size) for m in archive if m.isfile() and _has_image_suffix(m.name))
    elif _has_image_suffix(relative):
        yield relative, 0, size


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
            return first, file.read_row_group(group, columns=["image"])["image"]
    except (pa.ArrowException, LookupError) as error:  # the file is another one than was listed
        raise OSError(f"{uri}: row {row} cannot be read: {error}") from error
