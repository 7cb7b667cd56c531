import os
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
