"""The Ray session of a driver, with the defaults that long runs need, and quiet terminals."""

import atexit
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from cluster.config import Section
from cluster.driver import forkserver
from cluster.driver.interrupt import end_as_ctrl_c
from cluster.driver.progress import printable
from cluster.errors import UserError
from cluster.redaction import without_user
from cluster.training.groups import THREAD

# OpenMP's threads spin at a barrier, by default for milliseconds: on a core that the one they wait for needs, where another
# process has its own. Not to spin at all costs a quarter of an idle machine's speed; to spin for longer, speed beside another.
OPENMP = {"GOMP_SPINCOUNT": "5000"}
# glibc gives every large activation back to the kernel and faults it in again at the next layer: twice as slow on a CPU.
# It keeps them in its first arena alone: Ray trains and embeds in threads, to which it gives others (a fifth slower).
WORKER_ENVIRONMENT = {
    **OPENMP,
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
# Ray lists its folder of logs ten times a second, a fiftieth of a core, to print what is new; twice where this is exceeded
LOG_LISTING = ("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
# Ray warns on the terminal of more processes than it expected: those of trainings side by side, which wait
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started")  # read when Ray is loaded

ROOM = 16 << 20  # bytes of the temporary folder
_begun = threading.Event()  # whether this process has begun a session
KNOCK, PATIENCE = 5.0, 30.0  # seconds for a port to open, and for the cluster behind it to answer


class RayConfig(Section):
    """Where Ray runs. Never part of a digest."""

    address: str | None = Field(
        None, description="of a running cluster; None: the cluster that runs this job, else Ray starts on this machine"
    )
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of a local Ray; None: what the machine has")

    @property
    def where(self) -> str:
        """The address, or "local". Ray sets the variable for a job's driver."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"


def prepare(config: RayConfig) -> str:
    """Begin to load what workers on this machine will need. Returns the program that Ray is to start them with."""
    if config.where != "local":
        return sys.executable
    os.environ.update(WORKER_ENVIRONMENT)
    return forkserver.python()


def start(config: RayConfig, log_file: Path | None = None) -> None:
    """Connect to or start Ray, set the Ray Data defaults, and send library chatter to `log_file`.

    Raises UserError when no cluster answers at the config's address, or Ray does not start here.
    """
    import ray.data
    import ray.train  # both bring handlers of logs of their own

    if log_file is not None:
        _log_to(log_file)
    os.environ.update(OPENMP)  # for what trains in this process: read when torch is loaded
    if not ray.is_initialized():
        with _standard_error_to(log_file or Path(os.devnull)):  # the C++ side prints a line of its own
            _connect(config)
        _begun.set()
    end_as_ctrl_c()
    atexit.register(_leave)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 2  # a node lost while a model loads is no reason to fail
    context.execution_no_progress_timeout_s = -1  # one batch of a large model may take long
    context.target_max_block_size = 1 << 30  # a block is one part: never split it


def _connect(config: RayConfig) -> None:
    """Begin the session. "local" starts a cluster beside any that happens to run on this machine."""
    import ray

    where = config.where
    if where != "local" and (why := silence(where)):
        raise UserError(_refused(where, why))
    options: dict[str, Any] = {"runtime_env": {"env_vars": WORKER_ENVIRONMENT}}
    if where == "local":  # workers inherit it: a runtime environment starts a Python of its own before each
        _check_room()
        options = {"num_cpus": config.num_cpus, "include_dashboard": False}
        os.environ.setdefault(*LOG_LISTING)
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # merge ours into that of the job which runs this driver
    try:
        with _python(prepare(config)):
            ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # of sockets, versions, tokens, time-outs: Ray raises all kinds
        ray.shutdown()
        raise UserError(_refused(where, str(error.__cause__ or error) or type(error).__name__)) from error


@contextmanager
def _python(program: str) -> Iterator[None]:
    """What Ray takes for Python, for which it has no option of its own."""
    own, sys.executable = sys.executable, program
    try:
        yield
    finally:
        sys.executable = own


def _check_room() -> None:
    """Without room for its logs and sockets Ray starts workers that end, again and again."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if os.path.isdir(folder) and (free := shutil.disk_usage(folder).free) < ROOM:
        found = f"{folder} has {free / 2**20:.1f} MB left, its logs and sockets need {ROOM >> 20}"
        raise UserError(f"Ray does not start here: {found}; make room, or give another folder as RAY_TMPDIR or TMPDIR")


def silence(address: str) -> str | None:
    """Why no cluster that takes us answers at an address; None when one does.

    Ray's own client waits minutes for a head that is dead, in native code; its check is ended here.
    """
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), KNOCK).close()
        except (OSError, ValueError) as error:
            return f"nothing answers ({error})"
    if address.startswith("ray://"):  # its server ends a wait by itself
        return None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    command += [] if address == "auto" else ["--address", address]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer in {PATIENCE:.0f} s"
    return _last_line(asked.stderr or asked.stdout or "no answer") if asked.returncode else None


def _last_line(said: str) -> str:
    return next((line for line in reversed(said.splitlines()) if line.strip()), said).strip()[:300]


def _refused(where: str, said: str) -> str:
    """One message of a session that did not begin: the last line that Ray said, and what to do."""
    if where != "local":
        refused = f"no Ray cluster takes us at {where}: {_last_line(said)}"
        return f"resources.ray.address: {refused}\n`vdg doctor` checks address and token"
    if "AF_UNIX" in said or "socket path" in said:
        advice = "give it a short folder for its sockets, such as RAY_TMPDIR=/tmp"
    else:
        advice = "`vdg doctor` looks at disk, memory and shared memory"
    return f"Ray does not start here: {_last_line(said)}; {advice}"


def end(status: int) -> NoReturn:
    """End this process, which a failure or its user has stopped, without Ray's shutdown.

    Threads and iterators that a stopped stage leaves behind let their actors go then; Ray ends a process that calls it after
    its shutdown with status 1, or starts a session anew. What it has started here sees its driver gone, and ends.
    """
    if _begun.is_set():
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    raise SystemExit(status)


def _leave() -> None:
    """End Ray, and wait for threads that waited for it: one that wakes up after Python has ended aborts the process."""
    import ray

    ray.shutdown()
    for thread in threading.enumerate():
        if thread.name.startswith(THREAD):
            thread.join(5)


@contextmanager
def _standard_error_to(path: Path) -> Iterator[None]:
    """Send what native code writes to standard error to a file."""
    terminal = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


class _Formatter(logging.Formatter):
    """Libraries tell of the URIs and the names that they are given."""

    def format(self, record: logging.LogRecord) -> str:
        """A line, and a traceback if there is one."""
        return printable(without_user(super().format(record)))


def _log_to(path: Path) -> None:
    """Send every library's log lines and warnings to a file instead of the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("ray", "ray.data", "ray.train"):  # these bring terminal handlers of their own
        logger = logging.getLogger(name)
        for own in [h for h in logger.handlers if not isinstance(h, logging.FileHandler) and hasattr(h, "stream")]:
            logger.removeHandler(own)
        logger.propagate = True
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
