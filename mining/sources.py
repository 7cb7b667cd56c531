"""Listing the images of an outside source: a folder, tar files, or Parquet files of bytes."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

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
    names = read_names(config.split) if config.split else None
    rows = sorted(_listed(config.images, names, field))
    if not rows:
        raise UserError(f"{field}: no image found in {config.images}" + (f" for the names of {config.split}" if names else ""))
    kept: dict[str, _Row] = {}
    rejects = []
    for row in rows:
        if row[0] in kept:
            rejects.append(_reject(row[0], "duplicate_name", f"{row[1]} has the name of {kept[row[0]][1]}"))
        else:
            kept[row[0]] = row
    rejects += [_reject(name, "missing_image", f"named in {config.split}") for name in names or () if name not in kept]
    columns = zip(*kept.values(), strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX, strict=True)], schema=INDEX), rejects


def read_names(path: str) -> dict[str, str | None]:
    """Names of a split file, each with its path where the file gives one."""
    system, inside = filesystem(path)
    try:
        with system.open_input_file(inside) as stream:
            content = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a JSON list of names: {error}") from error
    return dict(content) if isinstance(content, dict) else dict.fromkeys(content)


def _reject(key: str, reason: str, detail: str) -> dict[str, str]:
    return {"key": key, "stage": "ingest", "reason": reason, "detail": detail}


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
                    yield name, file.path, offset, length


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
        self._group: tuple[tuple[str, int], int, pa.ChunkedArray] | None = None

    def read(self, uri: str, offset: int, length: int) -> bytes:
        """Encoded bytes of one image. Raises OSError when they cannot be read."""
        system, path = filesystem(uri)
        if path.endswith(".parquet"):
            return self._from_parquet(system, path, offset)
        with system.open_input_file(path) as stream:
            return stream.read_at(length, offset)

    def _from_parquet(self, system: pafs.FileSystem, path: str, row: int) -> bytes:
        if self._group is None or self._group[0][0] != path or not 0 <= row - self._group[1] < len(self._group[2]):
            with system.open_input_file(path) as stream:
                file, first, group = pq.ParquetFile(stream), 0, 0
                while row >= first + file.metadata.row_group(group).num_rows:
                    first += file.metadata.row_group(group).num_rows
                    group += 1
                self._group = (path, group), first, file.read_row_group(group, columns=["image"])["image"]
        return self._group[2][row - self._group[1]].as_py() or b""
