"""Commands as Ray jobs: the name of each attempt, what travels to the cluster, and what must not.

A job carries our packages and a config as text. Weights, images and secrets stay where the cluster has them.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.redaction import without_user

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PROJECT = Path(__file__).parents[2]
PACKAGES = ("cluster", "mining", "vdg", "cir")
CONFIG = "config.yaml"  # of the job's working folder
ALIVE = ("PENDING", "RUNNING")
SECRET = re.compile(r"(^|_)(TOKEN|KEY)(_|$)|API_?KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)  # in a variable's name


@dataclass(frozen=True)
class Job:
    """A command on a config, ready to be sent. The base of its id is the run's name and digest."""

    base: str
    entrypoint: str
    config: str  # YAML
    environment: Mapping[str, str]
    metadata: Mapping[str, str]
    outputs: tuple[str, ...]  # where those of the stages asked for lie; empty when only the cluster can tell


def connect(address: str) -> "JobSubmissionClient":
    """A client of the head's job server, with its token. Raises UserError when it cannot be reached or refuses."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # Ray tells of every package that it uploads
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise UserError(
            f"--address {address}: {error}\nIt is the address of the dashboard (http://HEAD:8265). Set RAY_AUTH_MODE=token; "
            "the token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, and must be the head's"
        ) from error


def send(client: "JobSubmissionClient", job: Job, submission_id: str, folder: Path) -> str:
    """Submit a job; its config is written to `folder`, which travels with it. Returns the id.

    Raises UserError when the cluster refuses it, such as for an id that another submission took in between.
    """
    (folder / CONFIG).write_text(job.config)
    try:
        return client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=submission_id,
            runtime_env={  # of each process: our packages, the folder of the config, and environment variables
                "working_dir": str(folder),
                "py_modules": [str(PROJECT / name) for name in PACKAGES],
                "excludes": ["__pycache__/"],
                "env_vars": dict(job.environment),
            },
            metadata=dict(job.metadata),
        )
    except RuntimeError as error:
        raise UserError(f"{submission_id}: the cluster refused the job: {str(error).strip().splitlines()[-1]}") from error


def last_attempt(base: str, jobs: "Iterable[JobDetails]") -> "tuple[int, JobDetails] | None":
    """Number and details of the latest of the jobs `base`, `base.2`, `base.3`, ...; None before the first."""
    attempts = []
    for job in jobs:
        found = re.fullmatch(re.escape(base) + r"(?:\.(\d+))?", job.submission_id or "")
        if found:
            attempts.append((int(found[1] or 1), job))
    return max(attempts, key=lambda attempt: attempt[0], default=None)


def next_id(base: str, last: "tuple[int, JobDetails] | None") -> str:
    """The id of the attempt after `last`. Raises UserError while that one is pending or running."""
    if last is None:
        return base
    number, job = last
    if job.status in ALIVE:
        name = job.submission_id
        raise UserError(
            f"{name}: this run is already {str(job.status.value).lower()}; "
            f"`vdg logs {name} --follow` shows it, `vdg stop {name}` ends it"
        )
    return f"{base}.{number + 1}"


def check_paths(paths: Mapping[str, str], local: bool) -> None:
    """Raises UserError naming each field whose path the cluster cannot have.

    A job runs in a folder of its own, so a relative path means nothing there. Neither do files of this checkout, unless
    the nodes are `local`; every other absolute path or URI is taken as the cluster's own, a disk that all its nodes mount.
    """
    wrong = {}
    for field, path in paths.items():
        if "://" not in path and not Path(path).is_absolute():
            wrong[field] = f"{path} is relative; write it as the cluster's nodes see it"
        elif not local and Path(path).is_relative_to(PROJECT):
            wrong[field] = f"{path} is a file of this machine's checkout; copy it to a store that the cluster reads"
    flag = "" if local else "; --local if its nodes are on this machine, or see its disks"
    _refuse(f"path(s) that the cluster does not have; use an absolute path on a shared disk, or a URI{flag}", wrong)


def check_secrets(environment: Mapping[str, str], texts: Mapping[str, str]) -> None:
    """Raises UserError naming each variable or text, by config field, with a secret: Ray shows a job's to everyone."""
    texts = {**texts, **{f"--env {name}": value for name, value in environment.items()}}
    wrong = {field: "holds a URI with a password" for field, text in texts.items() if without_user(text) != text}
    wrong |= {f"--env {name}": "looks like a secret" for name in environment if SECRET.search(name)}
    _refuse("secret(s); set them in the environment of the cluster's nodes, jobs inherit it", wrong)


def _refuse(what: str, wrong: Mapping[str, str]) -> None:
    if wrong:
        lines = "\n".join(f"  {field}: {problem}" for field, problem in wrong.items())
        raise UserError(f"{len(wrong)} {what}:\n{lines}")
