"""Content-addressed stage outputs: digests, part files written by rename, and manifests.

An output lives at `<root>/<stage>/<instance>-<digest>/`. Its `manifest.json` is written last and marks success.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import TypeAdapter

from cluster.errors import UserError, shown
from cluster.files import files_below
from cluster.manifest import Manifest, checked, parse
from cluster.stores import open_store

HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{32}")
MANIFEST = "manifest.json"
AUTHORS = "authors.json"  # of labelled triplets: how many rows are whose, where their source says it
ENVIRONMENT = "environment"  # folder of an output: what the models that made it ran on
WARNINGS = "warnings.json"  # of an output: what its stage found odd, a sentence each
REUSED = "reused.json"  # rows that an output took over from earlier ones, by their names
T = TypeVar("T")
REJECTS = pa.schema([("key", pa.string()), ("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


def reject_row(stage: str, key: str, reason: str, detail: str) -> dict[str, str]:
    """A row of `REJECTS`: what is not UTF-8 is escaped, a long detail is cut."""
    return {"key": shown(key), "stage": stage, "reason": reason, "detail": shown(detail)[:200]}


class NoPlaceError(UserError, ValueError):
    """A path or URI that no filesystem takes."""


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a URI or local path, and the path inside it. Raises OSError or NoPlaceError."""
    try:
        if "://" in uri:
            return open_store(uri)
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    except (RuntimeError, ValueError, pa.ArrowException) as error:  # RuntimeError: of `~nobody`, or links in a circle
        raise NoPlaceError(f"{uri}: {error}; give a folder, or a URI of a store such as s3://bucket/folder") from error


def below(root: str, path: str) -> str:
    """A path below a root; the query of a URI, such as an S3 endpoint, stays at its end."""
    base, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return f"{base.rstrip('/')}/{path}{mark}{query}"


@dataclass(frozen=True)
class Output:
    """The folder of one stage instance, on any pyarrow filesystem. Travels to Ray workers."""

    uri: str

    def __post_init__(self) -> None:
        if "://" not in self.uri:  # workers have a current folder of their own
            object.__setattr__(self, "uri", filesystem(self.uri)[1])

    @property
    def location(self) -> tuple[pafs.FileSystem, str]:
        """Its filesystem, and its path in there."""
        return filesystem(self.uri) if "://" in self.uri else (pafs.LocalFileSystem(), self.uri)

    def path(self, name: str) -> str:
        """Path of a file of this output inside its filesystem."""
        return f"{self.location[1]}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name is there."""
        return self.location[0].get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def has_file(self, name: str) -> bool:
        """Whether a file of this name is there. Raises UserError when it is something else: a pipe would be waited for."""
        found = self.location[0].get_file_info(self.path(name)).type
        if found not in (pafs.FileType.NotFound, pafs.FileType.File):
            raise self.damaged(name, ValueError("it is no file"))
        return bool(found == pafs.FileType.File)

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the files in a folder of this output; those still being written are left out."""
        system, base = self.location
        selector = pafs.FileSelector(f"{base}/{folder}".rstrip("/"), allow_not_found=True)
        infos = system.get_file_info(selector)
        return sorted(i.base_name for i in infos if i.type == pafs.FileType.File and not i.base_name.startswith("."))

    def read_bytes(self, name: str) -> bytes:
        """Content of one file."""
        with self.location[0].open_input_file(self.path(name)) as stream:
            return stream.read()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file under a temporary name, then rename it: it is there whole or not at all.

        An object store has no rename: it copies the object and deletes the first, and the copy appears whole.
        """
        system, base = self.location
        folder, _, leaf = f"{base}/{name}".rpartition("/")
        temporary = f"{folder}/.{leaf}.{uuid.uuid4().hex}"
        system.create_dir(folder, recursive=True)
        try:
            with system.open_output_stream(temporary) as stream:
                stream.write(content)
            if isinstance(system, pafs.LocalFileSystem):
                _to_disk(temporary)
            system.move(temporary, f"{folder}/{leaf}")
        except OSError:  # half a file would keep a full disk full
            with suppress(OSError):
                system.delete_file(temporary)
            raise

    def files(self) -> list[str]:
        """Sorted paths of all files of this output and its folders; hidden ones, such as those being written, are left out."""
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each of `files`."""
        base = self.location[1]
        sizes = {info.path[len(base) :].lstrip("/"): info.size or 0 for info in self._every_file()}
        return {path: n for path, n in sizes.items() if not any(name.startswith(".") for name in path.split("/"))}

    def sweep(self) -> None:
        """Remove what killed processes left half written."""
        for info in self._every_file():
            if HALF_WRITTEN.fullmatch(info.base_name):
                with suppress(FileNotFoundError):  # it was being written, and now has its name
                    self.location[0].delete_file(info.path)

    def _every_file(self) -> list[pafs.FileInfo]:
        system, base = self.location
        infos = system.get_file_info(pafs.FileSelector(base, allow_not_found=True, recursive=True))
        return [info for info in infos if info.is_file]

    def read_json(self, name: str, kind: Any = Any) -> Any:
        """Content of one JSON file. Raises UserError when it is none, or not of the type `kind`."""
        content = self.read_bytes(name)
        try:
            return checked(TypeAdapter(kind), json.loads(content))
        except (ValueError, RecursionError) as error:
            raise self.damaged(name, error) from error

    def damaged(self, name: str, error: Exception) -> UserError:
        """What to say of a file that is there but does not hold what was written."""
        return UserError(f"{self.path(name)}: is damaged ({str(error).strip().splitlines()[0][:200]}); {self.remedy}")

    @property
    def remedy(self) -> str:
        """What to do about files that are not as they were made."""
        return f"bring back what was there, or remove {self.location[1]}: the same command then makes it anew"

    def write_json(self, name: str, content: Any) -> None:
        """Write one JSON file, indented."""
        self.write_bytes(name, json.dumps(content, indent=1).encode())

    def write_table(self, name: str, table: pa.Table, schema: pa.Schema) -> None:
        """Write a table as one Parquet file, with a checksum a page. Raises TypeError when it does not have `schema`."""
        check_schema(table.schema, schema, name)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=4096, write_page_checksum=True)
        self.write_bytes(name, sink.getvalue().to_pybytes())

    def read_table(self, name: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file. Raises TypeError when it does not have `schema`, UserError when it is damaged."""
        with self.open_parquet(name) as file:
            check_schema(file.schema_arrow, schema, self.path(name))
            return file.read(columns=columns)

    @contextmanager
    def open_parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file whose pages are compared with their checksums. Raises UserError when it is damaged."""
        try:
            with self.location[0].open_input_file(self.path(name)) as stream:
                yield pq.ParquetFile(stream, page_checksum_verification=True)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, OSError) as error:
            self.read_bytes(name)  # a store that fails says so itself
            raise self.damaged(name, error) from error

    def parts(self) -> list[str]:
        """Sorted names of the finished part files of the main table."""
        return [name for name in self.names() if name.startswith("part-")]

    def read_parts(self, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        """The whole main table; only for tables that fit the reader's memory."""
        tables = [self.read_table(name, schema, columns) for name in self.parts()]
        return pa.concat_tables(tables) if tables else schema.empty_table().select(columns or schema.names)

    def part_rows(self) -> dict[str, int]:
        """Number of rows of each part, from the Parquet footers."""

        def rows(name: str) -> int:
            with self.open_parquet(name) as file:
                return file.metadata.num_rows

        return _of_each(self.parts(), rows)

    def footers(self, names: list[str]) -> dict[str, str]:
        """Hex SHA-256 of the footer of each of these Parquet files; of a file that is none, of its last bytes."""
        system, _ = self.location

        def footer(name: str) -> str:
            with system.open_input_file(self.path(name)) as stream:
                size = stream.size()
                stream.seek(max(size - 8, 0))  # the footer's length, and what marks the file's end
                length = int.from_bytes(stream.read(4), "little")
                stream.seek(max(size - 8 - length, 0))
                return hashlib.sha256(stream.read(length + 8)).hexdigest()

        return _of_each(names, footer)

    def hashes(self, names: list[str]) -> dict[str, str]:
        """Hex SHA-256 of each of these files. Raises FileNotFoundError when one is missing."""
        system, _ = self.location

        def sha256(name: str) -> str:
            with system.open_input_stream(self.path(name)) as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()

        return _of_each(names, sha256)

    def write_rejects(self, name: str, rejects: list[dict[str, str]]) -> None:
        """Keep rejected rows (key, stage, reason, detail) beside the part they are missing from."""
        if rejects:
            self.write_table(f"rejects/{name}", pa.Table.from_pylist(rejects, REJECTS), REJECTS)

    def rejects(self) -> pa.Table:
        """All rejected rows of this output."""
        names = [f"rejects/{name}" for name in self.names("rejects")]
        return pa.concat_tables([REJECTS.empty_table(), *(self.read_table(name, REJECTS) for name in names)])

    def manifest(self) -> Manifest | None:
        """The manifest, or None while the stage has not finished. Raises UserError when it is not this output's, as written."""
        if not self.has_file(MANIFEST):
            return None
        content = self.read_json(MANIFEST)
        try:
            manifest = parse(content)
            if self.location[1].split("/")[-2:] != _folder_of(manifest["instance"], manifest["digest"]):
                raise ValueError(f"it is of {manifest['instance']}-{manifest['digest']}")
        except ValueError as error:
            raise self.damaged(MANIFEST, error) from error
        return manifest


def read_warnings(output: Output) -> list[str]:
    """What the stage of an output found odd; an earlier version's looked for nothing."""
    return output.read_json(WARNINGS, list[str]) if output.exists(WARNINGS) else []


def _of_each(names: list[str], read: Callable[[str], T]) -> dict[str, T]:
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


def output_of(root: str, instance: str, digest: str) -> Output:
    """Where the output of a stage's instance lives below a root."""
    return Output(below(root, "/".join(_folder_of(instance, digest))))


def _folder_of(instance: str, digest: str) -> list[str]:
    kind, _, name = instance.partition(":")
    return [kind, f"{name}-{digest}"]


def outputs_of(root: str, kind: str) -> Iterator[Output]:
    """Every output of a stage below a root, finished or not."""
    system, base = filesystem(below(root, kind))
    for folder in system.get_file_info(pafs.FileSelector(base, allow_not_found=True)):
        if folder.type == pafs.FileType.Directory:
            yield Output(below(root, f"{kind}/{folder.base_name}"))


def check_schema(found: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Raises TypeError naming the table when its columns are not those of the contract."""
    if not found.remove_metadata().equals(expected.remove_metadata()):
        raise TypeError(f"{where}: found columns {found.remove_metadata()}, expected {expected}")


def _to_disk(path: str) -> None:
    """A machine that loses its power after the rename must not leave an empty file of that name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(uri: str) -> list[tuple[str, int, int]] | None:
    """(name, size, modification time in ns) of a file or of each file below a folder; None when it is missing."""
    system, path = filesystem(uri)
    info = system.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        return None
    if info.type == pafs.FileType.File:
        return [(info.base_name, info.size, info.mtime_ns or 0)]
    found = (file for file in files_below(system, path) if not file.aside and not file.broken)
    return sorted((file.relative, file.size, file.mtime_ns) for file in found)
