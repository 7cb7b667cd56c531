"""A lease on an output: of two drivers at work on the same one, the second is refused.

The lease is the file `.lease` in the output's folder, which its owner renews every RENEW_EVERY seconds. Clocks may be set and
differ, so none decides alone. Of a driver in this machine's (or container's) processes the kernel tells whether it runs, by
its number and the tick since the boot at which it began. A lease of any other one that says it has expired is watched for
WATCH seconds: renewed meanwhile, it is live; else it is taken over. What it promises depends on the store:

- A local or shared folder: one driver at a time. Taking is under a file lock, which the kernel gives back when its
  holder dies.
- An object store: pyarrow has no "write unless it exists". A driver writes its lease, waits SETTLE seconds and reads it
  back: the last writer goes on, the other is refused. Two drivers can still both go on when one stalls for longer than
  SETTLE between reading and writing; the one whose lease was overwritten stops at its next renewal. (obstore has conditional
  puts, but would need every pyarrow URI, its options and its credentials said a second time in its own terms; it has no
  HDFS, and stores without conditional puts would need all this besides.)

Whatever slips through costs work, not tables: parts are deterministic and appear whole, so two drivers at most make the same
part twice.
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
from typing import Annotated

import psutil
from filelock import FileLock
from pyarrow import fs as pafs
from pydantic import Field, FiniteFloat

from cluster.artifacts import Output
from cluster.driver.interrupt import interrupt
from cluster.errors import UserError

LEASE = ".lease"
LOCK = ".lease.lock"
EXPIRY = 60.0  # seconds without a renewal after which a lease says it is void
RENEW_EVERY = 10.0
WATCH = 25.0  # seconds in which a live driver has renewed, a failed try included
SETTLE = 2.0  # seconds in which a rival that read before we wrote has written


@dataclass(frozen=True)
class Lease:
    """Who works on an output, and until when that holds unless renewed; times in seconds since the epoch."""

    owner: str
    host: str
    processes: str  # boot and namespace that `pid` counts in: containers and cloned machines may share a host's name
    pid: Annotated[int, Field(ge=0, lt=1 << 31)]
    started: FiniteFloat  # of the process: clock ticks since the boot
    expires: FiniteFloat

    @property
    def live(self) -> bool | None:
        """Whether its driver is at work; None where nobody here can tell, and it says that it has expired."""
        if self.is_here and ((began := _started(self.pid)) is not None or not psutil.pid_exists(self.pid)):
            return began == self.started
        return True if time.time() < self.expires else None

    @property
    def is_here(self) -> bool:
        """Whether its driver is one of the processes that this one sees."""
        return (self.host, self.processes) == (platform.node(), _process_namespace())


def _process_namespace() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(namespace)}" if boot.exists() and namespace.exists() else ""


def _started(pid: int) -> float | None:
    """When a process began, 0 for one that has ended; None where it is not seen. A later one of its number began later."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return 0.0 if state in "ZX" else float(values[18])  # its name, in brackets, may have spaces


def read(output: Output) -> Lease | None:
    """The lease on an output; None where there is none, or half a one of a machine that lost its power.

    Raises UserError when something else has its name.
    """
    if not output.has_file(LEASE):
        return None
    try:
        return output.read_json(LEASE, Lease)
    except (FileNotFoundError, UserError):
        return None


def check(*outputs: Output) -> None:
    """Raises UserError when another driver is at work on one of the outputs."""
    found = {output: lease for output in outputs if (lease := read(output)) is not None}
    for output, lease in found.items():
        if lease.live:
            raise _refusal(output, lease)
    expired = {output: lease for output, lease in found.items() if lease.live is None}
    if expired:
        time.sleep(WATCH)
    for output, lease in expired.items():
        now = read(output)
        if now is not None and now != lease:
            raise _refusal(output, now)


def _refusal(output: Output, lease: Lease) -> UserError:
    known = f"{output.uri}: another driver is at work on it, process {lease.pid} on {lease.host}; wait for it, or stop it there"
    if lease.is_here:
        return UserError(known)
    left = max(lease.expires - time.time(), 0)
    return UserError(f"{known}. Should it be gone, its lease ends in {left:.0f} s: give the same command again then")


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
    system, base = output.location
    local = isinstance(system, pafs.LocalFileSystem)
    system.create_dir(base, recursive=True)
    output.has_file(LOCK)
    with FileLock(f"{base}/{LOCK}") if local else nullcontext():
        check(output)
        _write(output, owner)
    if not local:
        time.sleep(SETTLE)
        lease = read(output)
        if lease is not None and lease.owner != owner:
            raise _refusal(output, lease)


def _write(output: Output, owner: str) -> None:
    pid = os.getpid()
    lease = Lease(owner, platform.node(), _process_namespace(), pid, _started(pid) or 0.0, time.time() + EXPIRY)
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
                self.output.location[0].delete_file(self.output.path(LEASE))
