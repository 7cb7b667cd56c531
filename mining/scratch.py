"""Files that all of a user's processes on a node share: made once, then read or memory-mapped by whoever opens them."""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from cluster.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
LEAST = 2**20  # bytes that a disk with room has free: not every library says that it was full
UNUSED_SECONDS = 24 * 3600  # a file that nobody opened for so long is removed


def shared(key: bytes, suffix: str, make: Callable[[Path], object]) -> Path:
    """The file or folder of this key, made by `make` where the node does not have it yet.

    They lie in a folder of this user in the temporary folder (TMPDIR): a disk of the node, where one can be chosen. What
    nobody opened for a day is removed when another is made; who still maps it keeps it. Raises UserError when that folder
    is not this user's alone, or its disk is full.
    """
    folder = _own_folder()
    path = folder / f"{hashlib.sha256(key).hexdigest()[:24]}{suffix}"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _remove_unused(folder)
            partial = path.with_suffix(".partial")
            _remove(partial)  # of a killed process
            try:
                make(partial)
            except Exception as error:
                full = getattr(error, "errno", None) in FULL or shutil.disk_usage(folder).free < LEAST
                _remove(partial)
                if not full:
                    raise
                raise UserError(
                    f"{folder}: its disk is full ({error}); make room there, or set TMPDIR to a larger one"
                ) from error
            partial.rename(path)
        path.touch()
    return path


def new_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped array in a new file of numpy's format. Raises OSError where the disk has no room for all of it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    allocate(path, path.stat().st_size)
    return array


def allocate(path: Path, size: int) -> None:
    """Give a file its blocks: writing to a map of a file with holes, on a disk that is full, kills the process (SIGBUS)."""
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _own_folder() -> Path:
    """Made where it is missing; refused where another user, who could write into the same temporary folder, made it."""
    folder = Path(tempfile.gettempdir()) / f"vdg-shared-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # of a link itself, which all may write
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{folder}: belongs to user {found.st_uid} with mode {stat.filemode(found.st_mode)}, so that others can change "
            "the files in it; remove it, or set TMPDIR to a folder of your own"
        )
    return folder


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("*.*"):
        with suppress(FileNotFoundError):  # another process removes it too
            if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
