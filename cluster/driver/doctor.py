"""Whether a machine can do the work: one small check a subject, and what to do about what it finds.

Nothing is compiled, downloaded or started.
"""

import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from cluster.artifacts import filesystem
from cluster.driver.session import RayConfig, silence
from cluster.redaction import without_user

DISTRIBUTION = "visual-delta"
GIGABYTE = 2**30
TIMEOUT = 5.0  # seconds to wait for a server


@dataclass(frozen=True)
class Finding:
    """What one check found. A blocker stops a run; a warning makes it slow or unsafe."""

    subject: str
    state: Literal["ok", "warning", "blocker"]
    found: str
    advice: str = ""


def examine(root: str = "outputs", tracking_uri: str | None = None, ray_address: str | None = None) -> list[Finding]:
    """Every check of what a run is going to use, in the order in which problems are best mended.

    Without the URI of MLflow there is nothing to reach; without Ray's address, or with "local", Ray starts on this machine.
    """
    checks: list[Callable[[], Finding]] = [
        packages,
        gpus,
        cuda,
        lambda: ray_cluster(ray_address),
        lambda: ray_token(ray_address),
        lambda: mlflow_store(tracking_uri),
        lambda: disk(root),
        lambda: shared_memory(Path("/dev/shm")),
        memory,
    ]
    return [check() for check in checks]


def packages() -> Finding:
    """The installed versions against the bounds that this project declares."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return Finding("packages", "warning", f"{DISTRIBUTION} is not installed, so no bounds are known", "`pip install -e .`")
    versions, wrong = [], []
    for requirement in (r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        fits = found != "missing" and requirement.specifier.contains(found, prereleases=True)
        versions.append(f"{requirement.name} {found}")
        wrong += [] if fits else [f"{requirement.name} {found}, needs {requirement.specifier}"]
    if wrong:
        return Finding("packages", "blocker", "; ".join(wrong), "`pip install -c constraints.txt -e .`")
    return Finding("packages", "ok", ", ".join(versions))


def gpus() -> Finding:
    """The GPUs that torch sees."""
    import torch

    there = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    names = ", ".join(f"{gpu.name} ({gpu.total_memory / GIGABYTE:.0f} GB)" for gpu in there)
    return Finding("GPUs", "ok", names or "none: models run on the CPU")


def cuda() -> Finding:
    """Whether torch was built for the driver and the GPUs of this machine."""
    import torch

    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    if not Path("/proc/driver/nvidia/version").exists():
        return Finding("CUDA", "ok", f"{built}; no NVIDIA driver here")
    if not torch.cuda.is_available():
        advice = "`nvidia-smi` names the newest CUDA of the driver: install a torch built for it or an older one"
        return Finding("CUDA", "blocker", f"{built}; there is an NVIDIA driver, but torch cannot use it", advice)
    # code of a major version runs on its later minor ones
    major = {name.partition("_")[2][:-1] for name in torch.cuda.get_arch_list()}
    here = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    if foreign := [gpu.name for gpu in here if str(gpu.major) not in major]:
        return Finding("CUDA", "blocker", f"{built}; it has no code for {', '.join(foreign)}", "install a torch for this GPU")
    return Finding("CUDA", "ok", built)


def ray_cluster(address: str | None) -> Finding:
    """Whether the head of the cluster that the config names answers."""
    import ray

    found = f"Ray {ray.__version__}"
    address = RayConfig(address=address).where
    if address == "local":
        return Finding("Ray", "ok", f"{found}; it starts on this machine")
    if why := silence(address):
        advice = "`ray status` on the head shows its address (host:6379); correct resources.ray.address"
        return Finding("Ray", "blocker", f"{found}; no cluster takes us at {address}: {why}", advice)
    return Finding("Ray", "ok", f"{found}; {address} answers")


def ray_token(address: str | None) -> Finding:
    """Whether the token that a cluster asks for is on, and there."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    has_token = "RAY_AUTH_TOKEN" in os.environ or path.exists()
    found = f"RAY_AUTH_MODE is {mode or 'not set'}; {'a' if has_token else 'no'} token is here"
    if mode == "token" and not has_token:
        advice = f"`ray get-auth-token --generate` on the head; copy it to {path} on every node, readable by you alone"
        return Finding("Ray's token", "blocker", found, advice)
    if address not in (None, "local") and mode != "token":
        advice = "set RAY_AUTH_MODE=token on every node: without it whoever reaches a port of Ray runs code there"
        return Finding("Ray's token", "warning", found, advice)
    return Finding("Ray's token", "ok", found)


def mlflow_store(uri: str | None) -> Finding:
    """Whether MLflow's server answers, or a SQLite file can be written."""
    found = f"MLflow {version('mlflow')}"
    if uri is None:
        return Finding("MLflow", "ok", found)
    if uri.startswith("sqlite:///"):
        if problem := _unwritable(Path(uri.removeprefix("sqlite:///")).parent):
            return Finding("MLflow", "blocker", f"{found}; {problem}", "correct tracking.uri or root")
        return Finding("MLflow", "ok", f"{found}; {uri}")
    if not uri.startswith(("http://", "https://")):
        return Finding("MLflow", "warning", f"{found}; {uri.partition(':')[0]} stores are not tried here")
    address = without_user(uri)
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=TIMEOUT):
            return Finding("MLflow", "ok", f"{found}; the server at {address} answers")
    except urllib.error.HTTPError as error:  # it answers, and may ask for a password
        advice = "set MLFLOW_TRACKING_USERNAME and _PASSWORD"
        return Finding("MLflow", "warning", f"{found}; {address} answers {error.code}", advice)
    except (OSError, ValueError, http.client.HTTPException) as error:
        advice = "start it (`mlflow server`), or correct tracking.uri"
        return Finding("MLflow", "blocker", f"{found}; {address} cannot be reached ({error!r})", advice)


def disk(root: str) -> Finding:
    """Whether the root can be written, and what is free there."""
    if "://" in root:
        try:
            system, path = filesystem(root)
            system.get_file_info(path)
        except (OSError, ValueError) as error:
            return Finding("root", "blocker", without_user(f"{root}: {error}"), "correct root, or the store's credentials")
        return Finding("root", "ok", f"{without_user(root)} answers")
    folder = Path(filesystem(root)[1])
    if problem := _unwritable(folder):
        return Finding("root", "blocker", problem, "correct root")
    free = shutil.disk_usage(_existing(folder)).free / GIGABYTE
    advice = "`vdg ls` shows the outputs, `vdg clean` removes unused ones; or set root to a larger disk"
    state: Literal["ok", "warning", "blocker"] = "blocker" if free < 1 else "warning" if free < 20 else "ok"
    return Finding("root", state, f"{free:,.0f} GB free below {folder}", advice if state != "ok" else "")


def shared_memory(folder: Path) -> Finding:
    """Whether Ray's object store fits where it lies: it takes 30 % of the memory, else it falls back to a disk."""
    import psutil

    if not folder.is_dir():
        found = f"{folder} does not exist: Ray's object store is slow"
        return Finding("shared memory", "warning", found, "mount a tmpfs there")
    wanted, total = 0.3 * psutil.virtual_memory().total / GIGABYTE, shutil.disk_usage(folder).total / GIGABYTE
    found = f"{shutil.disk_usage(folder).free / GIGABYTE:.1f} of {total:.1f} GB free in {folder}"
    if total < wanted:
        advice = f"start the container with --shm-size={wanted:.0f}g, or mount a memory volume there"
        return Finding("shared memory", "warning", f"{found}; Ray wants {wanted:.1f} GB", advice)
    return Finding("shared memory", "ok", found)


def memory() -> Finding:
    """What this machine can still give to models."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIGABYTE:.1f} of {memory.total / GIGABYTE:.1f} GB available"
    if memory.available < 2 * GIGABYTE:
        return Finding("memory", "warning", found, "end other programs, or lower resources.*.actors and batch sizes")
    return Finding("memory", "ok", found)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _unwritable(folder: Path) -> str:
    """Why a folder cannot be made or written; empty when it can."""
    place = _existing(folder)
    if not place.is_dir():
        return f"{place} is a file, not a folder"
    return "" if os.access(place, os.W_OK) else f"{place} cannot be written by this user"
