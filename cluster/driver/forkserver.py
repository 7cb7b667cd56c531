"""Workers of a Ray on this machine as forks of one process that has loaded the libraries, which takes each some ten seconds.

Ray starts workers with the Python of the process that starts it. `python` names a program to be taken for that one, which asks
the server for a fork (fork_client.py). A worker differs in nothing but the time that it takes to begin.
"""

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.driver import fork_client
from cluster.ending import end_at_once
from cluster.training.engine import load_deepspeed

LIBRARIES = ("pandas", "pyarrow.dataset", "torchvision", "transformers.generation", "timm", "peft", "open_clip")
RAY = ("ray.data", "ray.train.torch")
GPUS = ("/dev/nvidiactl", "/dev/kfd")
_servers: list[subprocess.Popen[bytes]] = []  # to keep the pipe open


@cache
def python() -> str:
    """The program that Ray is to start workers with. The first call starts the server, which ends with this process.

    Python itself on other systems than Linux and beside a GPU, whose driver cannot be forked once a library has opened it.
    """
    if sys.platform != "linux" or any(map(os.path.exists, GPUS)):
        return sys.executable
    try:
        program = _program()
    except OSError:  # Ray will say that it has no folder either
        return sys.executable
    if not os.access(program, os.X_OK):  # where nothing may be run
        return sys.executable
    command = [sys.executable, "-m", "cluster.driver.forkserver", str(program.parent)]
    quiet = subprocess.DEVNULL
    # its own process group: Ctrl-C is for this process alone
    _servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, process_group=0))
    return str(program)


def _program() -> Path:
    """In a new folder that this user alone can open."""
    place = os.environ.get("RAY_TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix="vdg-", dir=place if place and os.path.isdir(place) else None))
    client = [sys.executable, "-IS", fork_client.__file__, sys.executable, str(_socket(folder))]
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    program.chmod(0o700)
    return program


def _socket(folder: Path) -> Path:
    return folder / "socket"


def serve(folder: Path) -> dict[str, Any] | None:
    """Load the libraries and fork for every client, until the driver has gone. Returns in each fork, with its request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(_socket(folder)))
        listener.listen(64)  # workers wait here while libraries load
        for library in LIBRARIES:
            if not _driver_lives(0):
                break
            with suppress(Exception):  # whatever needs it will say so
                importlib.import_module(library)
        else:
            load_deepspeed()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ends of workers are Ray's
        distinct: bool | None = None  # known once Ray is loaded
        while _driver_lives(None, listener):
            connection, _ = listener.accept()
            with connection:
                request = _receive(connection)
            if distinct is None:
                os.environ.update(request["environment"])  # Ray reads its settings there
                _load_ray()
                gc.collect()
                gc.freeze()  # a collection in a fork would copy all that it looks at
                distinct = _id_of_a_fork() != _id_of_a_fork()
            if os.fork() == 0:
                return {**request, "distinct": distinct}
            for stream in request["streams"]:
                os.close(stream)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _driver_lives(patience: float | None, *listeners: socket.socket) -> bool:
    """Its end closes standard input; nothing is ever said there."""
    return sys.stdin not in select.select([sys.stdin, *listeners], [], [], patience)[0]


def _receive(connection: socket.socket) -> dict[str, Any]:
    content, streams, *_ = socket.recv_fds(connection, 1 << 16, 3)
    while more := connection.recv(1 << 16):
        content += more
    return {**json.loads(content), "streams": streams}


def _load_ray() -> None:
    """Ray's own generator of random ids must not be used before a fork: all forks would draw the same from then on."""
    actor: Any = importlib.import_module("ray.actor")
    own = actor.ActorClassID
    actor.ActorClassID = SimpleNamespace(from_random=lambda: own(os.urandom(own.size())))
    try:
        for library in RAY:
            importlib.import_module(library)
    finally:
        actor.ActorClassID = own


def _id_of_a_fork() -> bytes:
    """A random id that Ray draws in a new fork."""
    from ray import ObjectID

    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, ObjectID.from_random().binary())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        return file.read()


def work(request: dict[str, Any]) -> None:
    """Be the process that the client was to become, or start it anew where forks of this Ray would not be told apart."""
    import numpy

    os.setpgrp()  # Ray ends the group of a worker with it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    if not request["distinct"]:
        os.execve(sys.executable, [sys.executable, *request["arguments"]], request["environment"])
    os.environ.clear()
    os.environ.update(request["environment"])
    numpy.random.seed()
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    """The server, or a worker."""
    if (request := serve(Path(sys.argv[1]))) is not None:
        work(request)


if __name__ == "__main__":
    end_at_once(main)  # a fork would copy 250 MB to be gone
