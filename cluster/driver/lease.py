"""A lease on an output: of two drivers at work on the same one, the second is refused.

The lease is the file `.lease` in the output's folder. Its owner renews it every RENEW_EVERY seconds; one that has expired,
or whose driver is known to be dead, is taken over. What it promises depends on the store:

- A local or shared folder: one driver at a time. Taking is under a file lock, which the kernel gives back when its
  holder dies.
- An object store: pyarrow has no "write unless it exists". A driver writes its lease, waits SETTLE seconds and reads it
  back: the last writer goes on, the other is refused. Two drivers can still both go on when one stalls for longer than
  SETTLE between reading and writing; the one whose lease was overwritten stops at its next renewal.

Machines must agree on the time within EXPIRY - RENEW_EVERY seconds. Whatever slips through costs work, not tables: parts
are deterministic and appear whole, so two drivers at most make the same part twice.
"""

import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock
from pyarrow import fs as pafs

from cluster.artifacts import Output, filesystem
from cluster.driver.interrupt import interrupt
from cluster.errors import UserError

LEASE = ".lease"
LOCK = ".lease.lock"
EXPIRY = 60.0  # seconds without a renewal after which a lease is void
RENEW_EVERY = 10.0
SETTLE = 2.0  # seconds in which a rival that read before we wrote has written


@dataclass(frozen=True)
class Lease:
    """Who works on an output, and until when that holds unless renewed; times in seconds since the epoch."""

    owner: str
    host: str
    processes: str  # boot and namespace that `pid` counts in: containers and cloned machines may share a host's name
    pid: int
    started: float
    expires: float

    @property
    def live(self) -> bool:
        """Whether its driver may still be at work."""
        here = (self.host, self.processes) == (platform.node(), _process_namespace())
        return time.time() < self.expires and not (here and not _is_running(self.pid, self.started))


def _process_namespace() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(namespace)}" if boot.exists() and namespace.exists() else ""


def _is_running(pid: int, started: float) -> bool:
    """Whether that very process runs, not a later one of the same number."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read(output: Output) -> Lease | None:
    """The lease on an output; None where there is none, or half a one of a machine that lost its power."""
    try:
        found: Lease = output.read_json(LEASE, Lease)
    except (FileNotFoundError, UserError):
        return None
    return found


def check(output: Output) -> None:
    """Raises UserError when another driver is at work on `output`."""
    lease = read(output)
    if lease is not None and lease.live:
        raise _refusal(output, lease)


def _refusal(output: Output, lease: Lease) -> UserError:
    return UserError(
        f"{output.uri}: another driver is at work on it, process {lease.pid} on {lease.host}; wait for it, or stop it there. "
        f"Should it be gone, its lease ends in {max(lease.expires - time.time(), 0):.0f} s: give the same command again then"
    )


@contextmanager
def hold(output: Output) -> Iterator[None]:
    """Hold the lease on `output`, renewed in the background.

    Raises UserError when another driver holds it, at the start or, after this process stood still for too long, later.
    """
    owner = uuid.uuid4().hex
    _take(output, owner)
    renewal = _Renewal(output, owner)
    renewal.start()
    try:
        yield
    except KeyboardInterrupt:
        if (rival := renewal.rival) is None:
            raise
        raise _refusal(output, rival) from None
    finally:
        renewal.stop()


def _take(output: Output, owner: str) -> None:
    system, base = filesystem(output.uri)
    local = isinstance(system, pafs.LocalFileSystem)
    system.create_dir(base, recursive=True)
    with FileLock(f"{base}/{LOCK}") if local else nullcontext():
        check(output)
        _write(output, owner)
    if not local:
        time.sleep(SETTLE)
        lease = read(output)
        if lease is not None and lease.owner != owner:
            raise _refusal(output, lease)


def _write(output: Output, owner: str) -> None:
    me = psutil.Process()
    expires = time.time() + EXPIRY
    lease = Lease(owner, platform.node(), _process_namespace(), me.pid, me.create_time(), expires)
    output.write_json(LEASE, asdict(lease))


class _Renewal(threading.Thread):
    """Renews a lease until stopped. Finding another's, it interrupts the thread that made it as Ctrl-C would."""

    def __init__(self, output: Output, owner: str) -> None:
        super().__init__(daemon=True)
        self.output, self.owner = output, owner
        self.rival: Lease | None = None
        self.holder = threading.current_thread()
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(RENEW_EVERY):
            with suppress(OSError):  # the store may come back before the lease expires
                self.rival = self._other()
                if self.rival is not None:
                    interrupt(self.holder)
                    return
                _write(self.output, self.owner)

    def _other(self) -> Lease | None:
        lease = read(self.output)
        return None if lease is None or lease.owner == self.owner else lease

    def stop(self) -> None:
        """Give the lease back; one that cannot be given back expires."""
        self._stopped.set()
        self.join()
        with suppress(OSError):
            if self._other() is None:
                filesystem(self.output.uri)[0].delete_file(self.output.path(LEASE))
