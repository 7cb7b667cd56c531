import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from cluster.errors import UserError
from mining.scratch import shared


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of this test lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"vdg-shared-{os.getuid()}"


def write(text: str, path: Path) -> None:
    path.write_text(text)


def test_a_file_is_made_once_in_a_folder_of_the_user_alone(folder: Path) -> None:
    paths = [shared(b"key", ".txt", partial(write, text)) for text in ("first", "second")]
    assert [path.read_text() for path in paths] == ["first", "first"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"vdg-shared-.* with mode drwxrwxrwx.*set TMPDIR"):
        shared(b"key", ".txt", Path.touch)


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.getuid()
    folder.with_name(f"vdg-shared-{user + 1}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(UserError, match=f"belongs to user {user} "):
        shared(b"key", ".txt", Path.touch)


def test_a_link_to_another_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="vdg-shared-"):
        shared(b"key", ".txt", Path.touch)


FILL = """
import sys, tempfile
from pathlib import Path
import faiss, numpy as np
from cluster.errors import UserError
from mining import indexes
from mining.scratch import new_array, shared
tempfile.tempdir = sys.argv[1]
vectors = np.random.default_rng(0).random((10_000, 64), np.float32)

def array(path):
    new_array(path, np.float32, (2**20,))[:] = 1

def saved(path):
    with path.open("wb") as file:
        np.save(file, np.ones(2**20, np.float32))

makes = {"array": array, "saved": saved, "text": lambda path: path.write_bytes(bytes(2**22))}
makes["lists"] = lambda path: indexes._write_on_disk(indexes.trained(vectors, 8), vectors, path)
try:
    shared(b"x", ".x", makes[sys.argv[2]])
except UserError as error:
    print(error)
print(sorted(path.name[24:] for path in Path(sys.argv[1]).glob("*/*")))
"""


@pytest.mark.parametrize("made", ["array", "saved", "text", "lists"])
def test_a_full_disk_is_a_message_and_leaves_nothing(tmp_path: Path, made: str) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2m none "$0" && exec "$@"']
    if subprocess.run([*mount, str(tmp_path), "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk of a size of its own can be mounted here")
    command = [*mount, str(tmp_path), sys.executable, "-c", FILL, str(tmp_path), made]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "its disk is full" in done.stdout
    assert "TMPDIR" in done.stdout
    assert done.stdout.splitlines()[-1] == "['.lock']"
