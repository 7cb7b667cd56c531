"""The service in process: what it answers, and every limit."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.app.serve import app as serving
from cluster.app.serve import guard, local
from cluster.app.serve.app import make_app
from cluster.errors import UserError
from cluster.weights import Weights
from mining.images import decode
from vdg import explain
from vdg.description import read_description

MODELS = ["supervised.s0", "semi.s0"]
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def run(finished: Graph) -> Run:
    return Run(finished)


@pytest.fixture(scope="module")
def guarded(run: Run) -> Any:
    """One service for all, as its processes load for seconds."""
    return make_app(run, MODELS, {"testserver"}, TOKEN)


@pytest.fixture(scope="module")
def client(guarded: Any) -> TestClient:
    return TestClient(guarded, headers={"authorization": f"Bearer {TOKEN}"})


def encoded(form: str = "PNG", size: tuple[int, int] = (80, 60), **how: Any) -> bytes:
    stream = BytesIO()
    Image.new("RGB", size, "red").save(stream, form, **how)
    return stream.getvalue()


def asked(client: TestClient, **changes: Any) -> Any:
    body = {"reference": {"image_id": first(client)}, "text": "make it red", "models": MODELS, "top": 5, **changes}
    return client.post("/v1/search", json=body)


def first(client: TestClient) -> str:
    return client.get("/v1/gallery").json()["images"][0]["image_id"]


def test_a_search_answers_as_the_run_does(client: TestClient, run: Run) -> None:
    image_id = first(client)
    answer = asked(client).json()
    assert set(answer["took_ms"]) == {"reference", "compose", "search"}
    for found in answer["answers"]:
        expected = run.search(int(image_id), "make it red", model=found["model"], top=5)
        assert [(hit["image_id"], hit["key"]) for hit in found["hits"]] == [(str(hit.image_id), hit.key) for hit in expected]
        assert found["digest"] == run.graph[f"train:{found['model']}"].digest
    kept = asked(client, exclude_reference=False, top=100).json()["answers"][0]["hits"]
    assert image_id in [hit["image_id"] for hit in kept]


def test_an_upload_is_searched_with_and_its_pixels_are_not_kept(client: TestClient, world: Path) -> None:
    content = sorted((world / "photos").iterdir())[5].read_bytes()
    uploaded = client.put("/v1/images", content=content).json()
    found = asked(client, reference={"upload": uploaded["upload"]}, text="größer 🍏").json()["answers"]
    assert len(found[0]["hits"]) == 5
    assert client.get(f"/v1/images/{uploaded['upload']}").status_code == 422


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"", 422, "empty_file"),
        (b"GIF89a", 422, "not_an_image"),
        (encoded("GIF"), 422, "not_an_image"),
        (encoded("BMP"), 422, "not_an_image"),
        (encoded("JPEG", (200, 200), quality=95)[:-100], 422, "truncated"),
        (encoded("PNG", (10_000, 5001)), 422, "too_large"),
        (b"\xff" * (guard.UPLOAD_BYTES + 1), 413, "larger than"),
    ],
)
def test_what_is_no_image_is_refused(client: TestClient, content: bytes, status: int, reason: str) -> None:
    answer = client.put("/v1/images", content=content)
    assert answer.status_code == status
    assert reason in answer.json()["detail"]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"text": ""}, 422),
        ({"text": "x" * 513}, 422),
        ({"top": 101}, 422),
        ({"models": []}, 422),
        ({"models": ["worst.s0"]}, 404),
        ({"models": MODELS * 3}, 422),
        ({"reference": {}}, 422),
        ({"reference": {"image_id": 1, "upload": "0" * 64}}, 422),
        ({"reference": {"image_id": 2**63}}, 422),
        ({"reference": {"image_id": 5}}, 404),
        ({"reference": {"upload": "0" * 64}}, 404),
        ({"reference": {"upload": "../../etc/passwd"}}, 422),
        ({"other": 1}, 422),
    ],
)
def test_what_is_no_search_is_refused(client: TestClient, changes: dict[str, Any], status: int) -> None:
    assert asked(client, **changes).status_code == status


def test_a_long_body_and_one_without_length_are_refused(client: TestClient) -> None:
    assert client.post("/v1/search", content=b"{" * (guard.BODY_BYTES + 1)).status_code == 413
    assert client.post("/v1/search", content=iter([b"{}"])).status_code == 411
    assert client.post("/v1/search", content=b"{}", headers={"content-type": "text/plain"}).status_code == 422


@pytest.mark.parametrize("body", [b'{"text": "\\ud800"}', b'{"top": NaN}', b'{"\\ud800": 1}'])
def test_what_no_answer_can_repeat_is_refused(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/v1/search", content=body, headers=headers).status_code == 422


def test_images_by_integer_alone(client: TestClient) -> None:
    image_id = first(client)
    for path in (f"/v1/images/{image_id}/thumbnail", f"/v1/images/{image_id}"):
        answer = client.get(path)
        assert answer.headers["content-type"] == "image/jpeg"
        assert "immutable" in answer.headers["cache-control"]
        assert Image.open(BytesIO(answer.content)).format == "JPEG"
    for name, status in (("5", 404), ("-1", 422), (str(2**63), 422), ("a.jpg", 422), ("..%2f..%2fetc%2fpasswd", 404)):
        assert client.get(f"/v1/images/{name}").status_code == status
    assert client.get("/page/app.py").status_code == 404


def test_every_answer_has_the_headers_and_none_lets_other_origins_in(client: TestClient) -> None:
    for path in ("/", "/page/page.js", "/page/page.css", "/v1/models", "/metrics", "/healthz", "/nowhere"):
        headers = client.get(path, headers={"origin": "http://evil.example"}).headers
        assert guard.HEADERS.items() <= dict(headers).items()
        assert "access-control-allow-origin" not in headers
    assert client.put("/v1/images", content=b"", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_another_host_name_is_refused(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/v1/models", headers={"host": "testserver:8000"}).status_code == 200


def test_metrics_time_each_step(client: TestClient) -> None:
    asked(client)
    text = client.get("/metrics").text
    for step in ("reference", "compose", "search"):
        assert f'vdg_step_seconds_count{{step="{step}"}}' in text


def test_a_token_opens_by_header_or_cookie(guarded: Any) -> None:
    client = TestClient(guarded, follow_redirects=False)
    assert client.get("/healthz").status_code == 200
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}, {"cookie": "vdg_token=é"}):
        encoded_headers = {name: value.encode("utf-8") for name, value in headers.items()}
        assert client.get("/v1/models", headers=encoded_headers).status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    for other in ("a/b=1", "a(b=1; c"):  # what another server on this host may have set
        assert client.get("/v1/models", headers={"cookie": f"{other}; vdg_token={TOKEN}"}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    answer = client.get(f"/?token={TOKEN}")
    assert answer.status_code == 303
    assert {"HttpOnly", "SameSite=Strict"} <= set(answer.headers["set-cookie"].split("; "))
    assert client.get("/v1/models").status_code == 200  # the client kept the cookie


def test_overload_is_sent_away(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "AT_A_TIME", 0)
    answer = client.get("/v1/models")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert client.get("/readyz").status_code == 200


def test_no_more_images_are_decoded_at_a_time_than_there_are_cores(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait; behind too many that wait they are sent away."""
    inside, most, go = [0], [0], threading.Event()
    lock = threading.Lock()

    def slow(*arguments: Any) -> Any:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        go.wait()
        with lock:
            inside[0] -= 1
        return decode(*arguments)

    monkeypatch.setattr(serving, "decode", slow)
    content, room = encoded(), 2 + serving.DECODING
    with ThreadPoolExecutor(guard.AT_A_TIME) as pool:
        waiting = [pool.submit(client.put, "/v1/images", content=content) for _ in range(guard.AT_A_TIME)]
        refused = [answer.result() for answer in islice(as_completed(waiting), guard.AT_A_TIME - room)]
        go.set()
        statuses = Counter(answer.result().status_code for answer in waiting)
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}
    assert statuses == {200: room, 503: guard.AT_A_TIME - room}
    assert most[0] == 2


def test_a_result_is_explained_by_the_generator(client: TestClient, run: Run, world: Path) -> None:
    image_id = first(client)
    hit = asked(client).json()["answers"][0]["hits"][0]["image_id"]

    def explained(reference: dict[str, str], candidate: str = hit) -> Any:
        return client.post("/v1/explain", json={"reference": reference, "candidate": candidate})

    said = explained({"image_id": image_id}).json()
    assert said["log_probability"] < 0
    assert said == explained({"image_id": image_id}).json() | {"took_ms": said["took_ms"]}
    known = run.explain(run.searcher.known(int(image_id)), int(hit))
    assert (known.delta, known.log_probability) == (said["delta"], pytest.approx(said["log_probability"]))
    uploaded = client.put("/v1/images", content=encoded()).json()
    assert uploaded["image_id"] is None
    assert explained({"upload": uploaded["upload"]}).status_code == 200
    assert explained({"image_id": image_id}, "5").status_code == 404
    assert explained({"upload": "0" * 64}).status_code == 404
    assert explained({}).status_code == 422


def test_a_generator_that_is_not_here_is_said(client: TestClient, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    description = read_description(run.graph.output(run.graph["instruct:vdg"]))
    missing = Weights(folder="/nowhere")
    elsewhere = description.model_copy(update={"vdg": description.vdg.model_copy(update={"language_model": missing})})
    monkeypatch.delitem(run.__dict__, "_explainer", raising=False)  # as before the first question
    pair = {"reference": {"image_id": first(client)}, "candidate": first(client)}
    with monkeypatch.context() as here:
        here.setattr(explain, "read_description", lambda _: elsewhere)
        answer = client.post("/v1/explain", json=pair)
    assert answer.status_code == 409
    assert "/nowhere" in answer.json()["detail"]
    assert client.get("/v1/models").json()["explains"] is True
    monkeypatch.setitem(run.__dict__, "pseudo_triplets", None)  # as where no variant has pseudo: true
    answer = client.post("/v1/explain", json=pair)
    assert (answer.status_code, answer.json()["detail"][:25]) == (404, "this run has no generator")


def test_others_connect_with_a_token_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other machines could connect"):
        local.read_token("0.0.0.0", None)
    (tmp_path / "short").write_text("secret")
    with pytest.raises(UserError, match="at least 16"):
        local.read_token("0.0.0.0", tmp_path / "short")
    (tmp_path / "long").write_text(f"{TOKEN}\n")
    assert local.read_token("0.0.0.0", tmp_path / "long") == TOKEN
    assert local.read_token("127.0.0.1", None) is None
    with pytest.raises(UserError, match="is no loopback address"):
        local.bind("0.0.0.0", 0, None)
    taken = local.bind("127.0.0.1", 0, None)
    with pytest.raises(UserError, match="cannot be bound"):
        local.bind("127.0.0.1", taken.getsockname()[1], None)
    taken.close()
