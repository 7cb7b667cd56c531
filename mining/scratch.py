"""Files that all processes of a node share: made once, then memory-mapped by whoever opens them."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

UNUSED_SECONDS = 24 * 3600  # a file that nobody opened for so long is removed


def shared(key: bytes, suffix: str, make: Callable[[Path], None]) -> Path:
    """The file or folder of this key, made by `make` where the node does not have it yet.

    They lie in a folder of this user in the temporary folder (TMPDIR): a disk of the node, where one can be chosen. What
    nobody opened for a day is removed when another is made; who still maps it keeps it.
    """
    folder = Path(tempfile.gettempdir()) / f"vdg-features-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(key).hexdigest()[:24]}{suffix}"
    with FileLock(folder / "lock"):
        if not path.exists():
            _remove_unused(folder)
            partial = path.with_suffix(".partial")
            _remove(partial)  # of a killed process
            make(partial)
            partial.rename(path)
        path.touch()
    return path


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("*.*"):  # not the lock
        if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
