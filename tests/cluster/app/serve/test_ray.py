"""The service on a real Ray Serve: what its replicas share, and what a kill and a new model cost under load."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray import serve

from cluster.app import config as configs
from cluster.app.config import RunConfig
from cluster.app.graph import Graph
from cluster.app.serve import local
from cluster.app.serve import ray as serving
from cluster.config import ActorResources
from cluster.errors import UserError
from tests.cluster.app.test_cli import invoke

MODEL = "supervised.s0"
CLIENTS, RATE = 8, 20  # requests a second
RESOURCES = ["resources.serve.actors=2", "resources.serve.cpus=0.5"]


def test_the_proxy_that_binds_everything_is_refused_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serving.HA_PROXY, "1")
    with pytest.raises(UserError, match="binds every address"):
        serving.check_proxy("127.0.0.1")
    serving.check_proxy("192.0.2.1")


def test_a_socket_open_to_others_is_found() -> None:
    for address, others in (("127.0.0.1", False), ("0.0.0.0", True)):
        with local.bind(address, 0, "0123456789abcdef") as bound:
            if others:
                with pytest.raises(UserError, match=r"has bound 0\.0\.0\.0"):
                    serving.check_bound("127.0.0.1", bound.getsockname()[1])
            else:
                serving.check_bound("127.0.0.1", bound.getsockname()[1])


def test_more_replicas_than_this_machine_takes_are_refused(replicated: RunConfig) -> None:
    resources = replicated.resources.model_copy(update={"serve": ActorResources(actors=1000)})
    with pytest.raises(UserError, match=r"serve: asks at once for 1000 x \(1 CPU, 0 GPU\); the cluster has .* 4 CPU"):
        serving.check_room(replicated.model_copy(update={"resources": resources}))


@dataclass(frozen=True)
class Answer:
    """A request's times, its status (0: no answer), and the digest of the model that answered."""

    began: float
    ended: float
    status: int
    digest: str | None


@dataclass(frozen=True)
class Service:
    port: int

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if answer.status == 200 else content
        finally:
            connection.close()

    def search(self, reference: dict[str, str]) -> tuple[int, Any]:
        asked = {"reference": reference, "text": "make it red", "models": [MODEL], "top": 3}
        return self.ask("POST", "/v1/search", json.dumps(asked).encode())

    def first(self) -> dict[str, str]:
        return {"image_id": self.ask("GET", "/v1/gallery")[1]["images"][0]["image_id"]}

    def timed(self, reference: dict[str, str]) -> Answer:
        began = time.monotonic()
        try:
            status, answer = self.search(reference)
        except (OSError, http.client.HTTPException):
            status, answer = 0, None
        return Answer(began, time.monotonic(), status, answer["answers"][0]["digest"] if status == 200 else None)

    @contextmanager
    def load(self) -> Iterator[list[Answer]]:
        """Searches at a fixed rate while the block runs; after it, their answers."""
        answers: list[Answer] = []
        reference, ended = self.first(), threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:

            def asking() -> None:
                while not ended.is_set():
                    pool.submit(lambda: answers.append(self.timed(reference)))
                    time.sleep(1 / RATE)

            asker = threading.Thread(target=asking)
            asker.start()
            try:
                yield answers
            finally:
                ended.set()
                asker.join()


def until(done: Any, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends, "it did not come"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def replicated(finished: Graph) -> RunConfig:
    path = Path(finished.root).parent / "tiny.yaml"
    return configs.load(str(path), RESOURCES)


@pytest.fixture
def service(replicated: RunConfig) -> Iterator[Service]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serving.deploy(replicated, serving.Options(models=MODEL), "127.0.0.1", port)
    yield Service(port)
    serve.shutdown()


def replicas() -> dict[int, psutil.Process]:
    """Of this test's Ray, by process id."""
    name = f"ray::ServeReplica:{serving.NAME}:Replica"
    return {found.pid: found for found in psutil.process_iter() if _title(found).startswith(name)}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_replicas_share_uploads_and_bind_loopback_alone(service: Service, world: Path) -> None:
    serving.check_bound("127.0.0.1", service.port)
    paths = sorted((world / "photos").iterdir())[:16]
    with ThreadPoolExecutor(16) as pool:  # at once: they are encoded together
        uploads = list(pool.map(lambda path: service.ask("PUT", "/v1/images", path.read_bytes())[1]["upload"], paths))
        for upload in uploads * 2:
            assert service.search({"upload": upload})[0] == 200


@pytest.mark.slow
def test_a_killed_replica_loses_only_what_was_in_flight(service: Service) -> None:
    before = replicas()
    assert len(before) == 2
    with service.load() as answers:
        until(lambda: len(answers) > 3 * RATE)
        killed = time.monotonic()
        next(iter(before.values())).kill()
        until(lambda: len(replicas()) == 2 and replicas().keys() != before.keys())
        back, seen = time.monotonic(), len(answers)
        until(lambda: len(answers) > seen + 3 * RATE)
    lost = [answer for answer in answers if answer.status != 200]
    print(f"{len(lost)} of {len(answers)} lost; a new replica after {back - killed:.1f} s")
    assert all(answer.began < killed + 0.5 and answer.ended > killed for answer in lost)
    assert len(lost) <= CLIENTS


@pytest.mark.slow
def test_another_model_takes_its_place_under_load(service: Service, replicated: RunConfig, world: Path) -> None:
    content = yaml.safe_load((world / "tiny.yaml").read_text())
    del content["rounds"]
    content["train"] |= {"training": content["train"]["training"] | {"steps": 5}, "variants": {"supervised": {}}}
    (world / "other.yaml").write_text(yaml.safe_dump(content | {"name": "other"}))
    invoke("run", str(world / "other.yaml"))
    other = configs.load(str(world / "other.yaml"), RESOURCES)
    old, new = (Graph(one)[f"train:{MODEL}"].digest for one in (replicated, other))
    with service.load() as answers:
        until(lambda: len(answers) > RATE)
        serving.deploy(other, serving.Options(models=MODEL), "127.0.0.1", service.port)
        seen = len(answers)
        until(lambda: len(answers) > seen + 3 * RATE)
    assert {answer.status for answer in answers} == {200}
    assert {answer.digest for answer in answers[:RATE]} == {old}
    assert {answer.digest for answer in answers[-RATE:]} == {new}
    assert {answer.digest for answer in answers} == {old, new}
