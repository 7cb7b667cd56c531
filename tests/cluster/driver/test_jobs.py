"""Ids of attempts, and what a job must not carry."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.driver import jobs
from cluster.errors import UserError


def job(submission_id: str | None, status: str) -> Any:
    from ray.job_submission import JobStatus

    return SimpleNamespace(submission_id=submission_id, status=JobStatus(status))


def next_id(*known: tuple[str | None, str]) -> str:
    return jobs.next_id("run-1a", jobs.last_attempt("run-1a", [job(*row) for row in known]))


def test_attempts_are_numbered_after_a_failure() -> None:
    assert next_id() == "run-1a"
    assert next_id(("run-1a", "FAILED")) == "run-1a.2"
    assert next_id(("run-1a.9", "FAILED"), ("run-1a.10", "STOPPED"), ("run-1a", "FAILED")) == "run-1a.11"


def test_other_runs_do_not_count() -> None:
    assert next_id(("run-1ab", "RUNNING"), ("run-1a.x", "RUNNING"), ("other", "RUNNING"), (None, "RUNNING")) == "run-1a"


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_second_job_of_a_live_run_is_refused_with_a_pointer_to_it(status: str) -> None:
    with pytest.raises(UserError, match=r"run-1a\.2: .*vdg logs run-1a\.2 --follow"):
        next_id(("run-1a", "FAILED"), ("run-1a.2", status))


def test_a_name_is_taken_literally() -> None:
    assert jobs.last_attempt("r.n-1", [job("rxn-1", "RUNNING")]) is None


def test_relative_paths_are_refused_everywhere_and_checkout_files_unless_local() -> None:
    relative, inside = {"evaluate.images": "photos"}, {"ingest.triplets.labelled.file": str(jobs.PROJECT / "t.json")}
    for local in (False, True):
        with pytest.raises(UserError, match=r"evaluate.images: photos is relative"):
            jobs.check_paths(relative, local)
    jobs.check_paths(inside, local=True)
    with pytest.raises(UserError, match=r"(?s)--local.*ingest.triplets.labelled.file: .*this machine's checkout"):
        jobs.check_paths(inside, local=False)
    jobs.check_paths({"root": "s3://bucket/root", "evaluate.images": "/shared/photos"}, local=False)


def test_secrets_do_not_travel() -> None:
    with pytest.raises(UserError, match="--env HF_TOKEN"):
        jobs.check_secrets({"HF_TOKEN": "x", "HF_HOME": "/shared/hf"}, {})
    for name in ("AWS_SECRET_ACCESS_KEY", "OPENAI_APIKEY", "PGPASSWORD", "DB_PASSWD", "GOOGLE_APPLICATION_CREDENTIALS"):
        with pytest.raises(UserError, match=f"--env {name}: looks like a secret"):
            jobs.check_secrets({name: "x"}, {})
    for uri in ("https://user:pass@mlflow.example", "s3://AKIA:a+b=@bucket/x", "s3://b?endpoint_override=http://:p@store"):
        with pytest.raises(UserError, match=r"tracking.uri: holds a URI with a password"):
            jobs.check_secrets({}, {"tracking.uri": uri})
        with pytest.raises(UserError, match=r"--env HTTP_PROXY: holds a URI with a password"):
            jobs.check_secrets({"HTTP_PROXY": uri}, {})
    free = {"root": "s3://bucket/root?endpoint_override=store:9000", "images": "http://host:80/a@b", "query": "red: a@b"}
    jobs.check_secrets({"HF_HOME": "/shared", "TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "x"}, free)
