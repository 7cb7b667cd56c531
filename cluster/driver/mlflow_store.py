"""MLflow's store: a SQLite file is made whole or not at all, and whatever a store fails of is said in one message."""

import logging
import os
import re
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from cluster.errors import UserError
from cluster.redaction import without_user

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# what SQLite says of a file that is none, or of tables that a process died in the middle of making
DAMAGED = re.compile(r"not a database|malformed|no such (table|column|index)|duplicate column|(table|index) \S+ already exists")
LONGEST = 300  # characters of a reason


def connect(uri: str) -> "MlflowClient":
    """A client of a store that answers; a SQLite file is made where there is none. Raises what `said` is for."""
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # they tell of every table, and print the SQL of a failure
        logging.getLogger(name).setLevel(logging.CRITICAL)
    path = sqlite_file(uri)
    if path is not None:
        _make(path)
        _open(path).close()
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


@contextmanager
def said(uri: str) -> Iterator[None]:
    """Make what a store raises a UserError: MLflow passes on what SQLAlchemy, HTTP clients and object stores raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        advice = "see that it answers and can be written, or give another URI"
        if sqlite_file(uri) is not None and DAMAGED.search(reason(error)):
            advice = "it is damaged: `vdg track` with the same config sets it aside and writes a new one from the outputs"
        raise UserError(f"tracking.uri: MLflow at {without_user(uri)} cannot be used ({reason(error)}); {advice}") from error


def reason(error: Exception) -> str:
    """Why a store failed, in a line: behind it come SQL and tracebacks, before it at times how SQLAlchemy got there."""
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line and not line.startswith("(raised as a result of")), type(error).__name__)
    return without_user(line)[:LONGEST]


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None of any other."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database
    except ArgumentError:
        return None
    return None if not name or name == ":memory:" or name.startswith("file:") else Path(name).absolute()


def sqlite_uri(path: Path) -> str:
    """The URI of a SQLite store. Raises UserError where SQLAlchemy would read another path out of it."""
    uri = f"sqlite:///{path}"
    if sqlite_file(uri) != path:
        raise UserError(
            f"root: {path.parent} has a '?' or '%', which the URI of MLflow's SQLite file cannot say; give another root, or "
            "tracking.uri, such as sqlite:////another/folder/mlflow.db"
        )
    return uri


def set_aside(uri: str) -> Path | None:
    """Rename a SQLite file that is damaged, so that a new one can be made. Returns its new name, or None where it is whole."""
    path = sqlite_file(uri)
    if path is None or not _is_begun(path):
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:  # MLflow keeps connections to what it has opened, under any later name
            copy = Path(folder) / _new_name()
            with closing(_open(path)) as there, closing(sqlite3.connect(copy)) as here:
                there.backup(here)
            connect(f"sqlite:///{copy}")
    except Exception as error:
        if not DAMAGED.search(reason(error)):
            raise
    else:
        return None
    aside = next(name for n in range(1, 1000) if not (name := path.with_name(f"{path.name}.damaged-{n}")).exists())
    with _lock(path):
        os.rename(path, aside)
    return aside


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _make(path: Path) -> None:
    """Make the tables beside a file's name, and give it the name when they are there. Of two drivers one makes them."""
    from mlflow.tracking import MlflowClient

    if _is_begun(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")  # of a driver that was killed there may be one
    with _lock(path):
        if _is_begun(path):
            return
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            made = new / _new_name()
            MlflowClient(f"sqlite:///{made}").search_experiments(max_results=1)
            path.with_name(f"{path.name}-journal").unlink(missing_ok=True)  # of an earlier file: it would be played back
            os.rename(made, path)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _is_begun(path: Path) -> bool:
    """Raises OSError where a new file would take the place of something else, such as a link to a disk that is not there."""
    if os.path.lexists(path) and not path.is_file():
        raise FileExistsError(f"{path} is no file, or a link to nothing")
    return path.exists() and path.stat().st_size > 0


def _new_name() -> str:
    return f"{uuid.uuid4().hex}.db"


def _open(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error for what is no database, at once: MLflow would try for more than a minute."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
