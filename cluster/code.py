"""Which code a driver runs, and as which Ray job: a manifest keeps both."""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code() -> dict[str, str]:
    """`version`, git `commit` and, where there is one, `ray_job` and `ray_submission` of this process."""
    return {"version": _version(), "commit": git_commit(), **_ray_job()}


def git_commit() -> str:
    """The commit of the code that runs, or 'unknown' outside a git checkout."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a container without git
        return "unknown"
    return found.stdout.strip() or "unknown"


def _version() -> str:
    try:
        return version("visual-delta")
    except PackageNotFoundError:  # run from a folder without an installation
        return "unknown"


def _ray_job() -> dict[str, str]:
    """The ids of the running Ray job; its submission id is in what Ray's job manager gives the entry point."""
    import ray

    job = {"ray_job": ray.get_runtime_context().get_job_id()} if ray.is_initialized() else {}
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    submission = metadata.get("job_submission_id")
    return {**job, **({"ray_submission": submission} if submission else {})}
