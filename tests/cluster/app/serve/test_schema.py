"""Requests drawn from the service's own schema, right and wrong ones: none ends in a server's error."""

import contextlib
import itertools
from collections import Counter
from typing import Any

import pytest

from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.app.serve.app import make_app
from cluster.monitor import Monitor

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")
strategies = pytest.importorskip("hypothesis.strategies")
pytestmark = pytest.mark.slow
CASES = 10_000


@pytest.fixture(scope="module")
def service(finished: Graph) -> Any:
    assert finished.index is not None
    finished.index.run(finished.root, Monitor())
    app = make_app(Run(finished), ["semi.s0"], {"localhost", "testserver"})
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_no_request_ends_in_a_servers_error(service: Any) -> None:
    operations = [found.ok() for found in service.get_all_operations()]
    assert len(operations) >= 10
    asked = Counter[int]()

    @hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None)
    @hypothesis.given(data=strategies.data())
    def check(data: Any, operation: Any, mode: Any) -> None:
        answer = data.draw(operation.as_strategy(generation_mode=mode)).call()
        asked[answer.status_code] += 1
        assert answer.status_code < 500, answer.text

    for operation, mode in itertools.cycle(itertools.product(operations, schemathesis.GenerationMode)):
        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # what takes nothing cannot be asked wrongly
            check(operation=operation, mode=mode)
        if asked.total() >= CASES:
            break
    print(f"{asked.total():,} requests of {len(operations)} operations: {dict(sorted(asked.items()))}")
