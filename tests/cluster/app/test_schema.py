"""Requests drawn from the service's own schema, right and wrong ones: none ends in a server's error."""

import contextlib
import itertools
from typing import Any

import pytest

from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.app.serve.app import make_app
from cluster.monitor import Silent

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(finished: Graph) -> Any:
    assert finished.index is not None
    finished.index.run(finished.root, Silent())
    app = make_app(Run(finished), ["semi.s0"], {"localhost", "testserver"})
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_no_request_ends_in_a_servers_error(service: Any) -> None:
    operations = [found.ok() for found in service.get_all_operations()]
    assert len(operations) >= 10
    for operation, mode in itertools.product(operations, schemathesis.GenerationMode):

        @hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            answer = case.call()
            assert answer.status_code < 500, answer.text

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # what takes nothing cannot be asked wrongly
            check()
