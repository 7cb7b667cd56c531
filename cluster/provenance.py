"""Which code made an output, as which Ray job, and on what: its manifest keeps all three.

None of it is in the digest, which `cluster/stage.py` makes of a stage's fields.
"""

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.artifacts import ENVIRONMENT, Output
from cluster.devices import device, uses_bf16


def code() -> dict[str, str]:
    """`version`, git `commit` and, where there is one, `ray_job` and `ray_submission` of this process."""
    import ray

    try:
        found = version("visual-delta")
    except PackageNotFoundError:  # run from a folder without an installation
        found = "unknown"
    job = {"ray_job": ray.get_runtime_context().get_job_id()} if ray.is_initialized() else {}
    submission = _job_metadata().get("job_submission_id")
    return {"version": found, "commit": git_commit(), **job, **({"ray_submission": submission} if submission else {})}


def git_commit() -> str:
    """The commit of the code that runs: of its checkout, or in a Ray job of the one it was sent from; else 'unknown'."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
        commit = found.stdout.strip()
    except FileNotFoundError:  # a container without git
        commit = ""
    return commit or _job_metadata().get("git_commit", "unknown")


def _job_metadata() -> dict[str, str]:
    """What a submitted job carries, as Ray's job manager gives it to the entry point; empty in any other process."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})


def record_environment(output: Output, precision: str) -> None:
    """Called by each process that runs a model; the manifest lists what was found, `auto` precision resolved."""
    import torch

    processor = torch.cuda.get_device_name() if device() == "cuda" else f"{platform.machine()} CPU"
    found = {"torch": version("torch"), "processor": processor, "precision": "bf16" if uses_bf16(precision) else "fp32"}
    name = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]  # like processes write the same file
    output.write_json(f"{ENVIRONMENT}/{name}.json", found)
