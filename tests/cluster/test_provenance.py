"""Which code made an output."""

import json

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from cluster.provenance import code, git_commit


def test_a_submitted_job_names_its_submission_and_the_commit_it_was_sent_from(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"job_submission_id": "photos-1.2", "git_commit": "abc"}
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"metadata": metadata}))
    assert code()["ray_submission"] == "photos-1.2"
    monkeypatch.setenv("PATH", "")  # no git, as in a container to which only packages travel
    assert git_commit() == "abc"


def test_outside_of_jobs_and_checkouts_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"
    assert "ray_submission" not in code()
