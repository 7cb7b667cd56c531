"""`vdg submit`, and what became of it: `vdg jobs`, `status`, `logs` and `stop`."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.app import submission
from cluster.app.commands.options import Config, Set
from cluster.driver import jobs
from cluster.driver.progress import answers, console, printable
from cluster.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

app = typer.Typer()

Address = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="of the head's dashboard, which serves jobs")
]
Name = Annotated[str, typer.Argument(metavar="JOB", help="as `vdg submit` and `vdg jobs` print it")]
HERE = "http://127.0.0.1:8265"


@app.command()
def submit(
    config: Config,
    assignments: Set = [],  # noqa: B006
    only: Annotated[str | None, typer.Option("--only", help="pattern of instances of one stage: 'train:semi.*'")] = None,
    until: Annotated[str | None, typer.Option("--until", help="the last stage to do")] = None,
    address: Address = HERE,
    local: Annotated[bool, typer.Option("--local", help="the cluster's nodes are on this machine, or see its disks")] = False,
    variables: Annotated[
        list[str], typer.Option("--env", help="NAME=value for every process of the job, such as HF_HOME=/shared/hf")
    ] = [],  # noqa: B006
    again: Annotated[bool, typer.Option("--again", help="submit a run that has succeeded once more")] = False,
) -> None:
    """Send `vdg run`, or some stages, to a Ray cluster as a job. The same run is never there twice at a time."""
    job, paths = submission.prepare(config, assignments, only, until, local, dict(map(_variable, variables)))
    client = jobs.connect(address)
    last = jobs.last_attempt(job.base, client.list_jobs())
    if last is not None and last[1].status == "SUCCEEDED" and not again:
        where = job.outputs or (
            f"below {job.metadata['root']}; `vdg ls` there lists them",
        )  # digests follow from the cluster's files
        console.print(f"{last[1].submission_id} has succeeded; --again submits it once more. Its outputs:")
        for line in where:
            console.print(f"  {line}")
        return
    for field, path in paths.items():
        console.print(f"  on the cluster: {field}: {path}")
    with tempfile.TemporaryDirectory() as folder:
        name = jobs.send(client, job, jobs.next_id(job.base, last), Path(folder))
    console.print(f"submitted {name}; `vdg logs {name} --follow --address {address}` shows what it does")


@app.command(name="jobs")
def list_jobs(address: Address = HERE) -> None:
    """The jobs that a cluster knows, the newest first."""
    table = Table("job", "state", "began", "minutes", "command")
    for job in sorted(jobs.connect(address).list_jobs(), key=lambda job: job.start_time or 0, reverse=True):
        table.add_row(job.submission_id or job.job_id, job.status.value, _clock(job), _minutes(job), job.entrypoint)
    answers.print(table)


@app.command()
def status(name: Name, address: Address = HERE) -> None:
    """One job: its state, since when, its stage and how far that is, and what Ray says of it."""
    client = jobs.connect(address)
    with _known(name):
        job = client.get_job_info(name)
        said = client.get_job_logs(name).strip().splitlines()
    table = Table("job", name)
    rows = {"state": job.status.value, "began": _clock(job), "minutes": _minutes(job), "command": job.entrypoint}
    rows["said last"] = said[-1].strip() if said else ""  # the stage, and how far it is
    for field, value in {**rows, "message": job.message or "", **(job.metadata or {})}.items():
        table.add_row(field, value)
    answers.print(table)


@app.command()
def logs(
    name: Name,
    address: Address = HERE,
    follow: Annotated[bool, typer.Option("--follow", help="until the job ends")] = False,
) -> None:
    """What a job's driver has printed, on standard output."""
    client = jobs.connect(address)
    with _known(name):
        if follow:
            client.get_job_status(name)  # the tail of an unknown job ends in an exception of the web socket
            asyncio.run(_follow(client, name))
        else:
            print(_shown(client.get_job_logs(name)), end="")


@app.command()
def stop(name: Name, address: Address = HERE) -> None:
    """End a job. What it has finished stays; the same `vdg submit` goes on from there."""
    with _known(name):
        stopped = jobs.connect(address).stop_job(name)
    console.print(f"{name}: {'asked to stop' if stopped else 'had already ended'}")


async def _follow(client: "JobSubmissionClient", name: str) -> None:
    async for lines in client.tail_job_logs(name):
        print(_shown(lines), end="", flush=True)


def _shown(lines: str) -> str:
    """What a job has printed holds names too; its progress may be drawn over with carriage returns."""
    return "\r".join(map(printable, lines.split("\r")))


@contextmanager
def _known(name: str) -> Iterator[None]:
    """The job server's answer about a job that it does not know is the user's mistake."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"{name}: {str(error).strip().splitlines()[-1]}; `vdg jobs` lists the jobs") from error


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError(f"--env {text}: expected NAME=value")
    return name, value


def _clock(job: "JobDetails") -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(job.start_time / 1000)) if job.start_time else ""


def _minutes(job: "JobDetails") -> str:
    if not job.start_time:
        return ""
    return f"{((job.end_time or time.time() * 1000) - job.start_time) / 60_000:.1f}"
