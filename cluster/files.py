"""The files below a folder, each once, whatever links there are and however they are named."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from pyarrow import fs as pafs

_SYSTEM = {
    "@eadir",
    "__macosx",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "lost+found",
}
AGAIN = "links to what is listed under its own name"
SPECIAL = "pipes, sockets and devices"


class File(NamedTuple):
    """A file below a folder, or what stands in a file's place."""

    path: str  # names that are not UTF-8 hold surrogates, as Python's file names do
    relative: str
    size: int = 0
    mtime_ns: int = 0
    aside: str | None = None  # why it is left out
    broken: str | None = None  # why it cannot be read


def is_hidden(relative: str) -> bool:
    """Whether a path is hidden, or lies in a folder that a system or a tool keeps for itself."""
    return any(name.startswith(".") or name.lower() in _SYSTEM for name in PurePosixPath(relative).parts if name != "..")


def is_text(name: str) -> bool:
    """Whether a name or text is UTF-8: one that is not holds lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def files_below(system: pafs.FileSystem, base: str) -> Iterator[File]:
    """The files below a folder. On the local disk each real path comes once, and links out of the folder are followed."""
    if isinstance(system, pafs.LocalFileSystem):
        yield from _Walk(base).files()
        return
    for info in system.get_file_info(pafs.FileSelector(base, recursive=True)):
        if info.is_file:
            yield File(info.path, info.path[len(base) :].lstrip("/"), info.size, info.mtime_ns or 0)


@dataclass
class _Walk:
    base: str
    links: list[str] = field(default_factory=list)
    followed: set[str] = field(default_factory=set)  # real paths that links led to

    def files(self) -> Iterator[File]:
        yield from self._below(self.base, linked=False)
        while self.links:
            path = self.links.pop(0)
            if is_hidden(os.path.relpath(path, self.base)):
                yield self._file(path, aside="hidden links")
            else:
                yield from self._below(path, linked=True)

    def _file(self, path: str, **why: str) -> File:
        return File(path, os.path.relpath(path, self.base), **why)  # type: ignore[arg-type]

    def _below(self, top: str, linked: bool) -> Iterator[File]:
        """What lies at a path that is no link, or at a link's end, and below it: deeper than calls may be nested."""
        waiting = [top]
        while waiting:
            path = waiting.pop()
            if linked and self._is_listed(real := os.path.realpath(path)):
                yield self._file(path, aside=AGAIN)
                continue
            try:
                found = os.stat(path)
                waiting += self._entries(path) if stat.S_ISDIR(found.st_mode) else []
            except OSError as error:
                yield self._file(path, broken=str(error.strerror))
                continue
            if linked:
                self.followed.add(real)
            if stat.S_ISREG(found.st_mode):
                yield File(path, os.path.relpath(path, self.base), found.st_size, found.st_mtime_ns)
            elif not stat.S_ISDIR(found.st_mode):
                yield self._file(path, aside=SPECIAL)

    def _entries(self, folder: str) -> list[str]:
        """Paths in a folder, the first one last; links are kept for later."""
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        self.links += [entry.path for entry in entries if entry.is_symlink()]
        return [entry.path for entry in reversed(entries) if not entry.is_symlink()]

    def _is_listed(self, real: str) -> bool:
        inside = os.path.relpath(real, os.path.realpath(self.base))
        within = not inside.startswith("..") and not is_hidden(inside) and os.path.exists(real)
        return within or real in self.followed
