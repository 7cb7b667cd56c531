"""Which pairs people see, and what is kept of their answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.app.labels import Judged, Labelling, Store, precision
from cluster.app.serve.app import make_app
from cluster.errors import UserError
from cluster.monitor import Silent


def judged(n: int, verdict: str = "right", **fields: Any) -> Judged:
    return Judged(label_id=f"{n:016d}", triplet_id=n, verdict=verdict, reason="uniform", **fields)  # type: ignore[arg-type]


def test_a_label_that_comes_twice_is_kept_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels" / "a.jsonl")
    first = store.add(judged(1, text="red"), "ann", "d")
    assert store.add(judged(1, "wrong"), "bob", "d") == first
    assert list(store) == [first]
    assert {"author", "time", "digest", "reason"} <= set(first)


def test_half_a_line_of_a_killed_process_loses_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl")
    store.add(judged(1), "ann", "d")
    with store.path.open("a") as file:
        file.write('{"label_id": "')
    store.add(judged(2), "ann", "d")
    assert [label["triplet_id"] for label in Store(store.path)] == [1, 2]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\r\n"])
def test_a_text_may_hold_what_ends_lines(tmp_path: Path, mark: str) -> None:
    store = Store(tmp_path / "a.jsonl")
    store.add(judged(1, "edited", text=f"red{mark}big"), "ann", "d")
    store.add(judged(2), "ann", "d")
    assert [label["text"] for label in store] == [f"red{mark}big", ""]


def test_the_last_label_counts_and_undoing_takes_it_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl")
    for n, (triplet, verdict, digest) in enumerate(
        [(1, "right", "d"), (1, "wrong", "d"), (2, "right", "d"), (2, "undone", "d"), (3, "right", "e")]
    ):
        label = Judged(label_id=f"{n:016d}", triplet_id=triplet, verdict=verdict, reason="uniform")  # type: ignore[arg-type]
        store.add(label, "ann", digest)
    assert {triplet: label["verdict"] for triplet, label in store.last("d").items()} == {1: "wrong"}


def test_precision_is_of_the_uniformly_drawn_alone() -> None:
    labels = [{"reason": "uniform", "verdict": verdict} for verdict in ["right"] * 8 + ["edited", "wrong", "skip"]]
    found = precision([*labels, {"reason": "disagreement", "verdict": "wrong"}])
    assert found is not None
    assert (found.judged, found.share) == (10, 0.8)
    assert (found.low, found.high) == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson's interval of 8 in 10
    assert precision([]) is None


@pytest.fixture
def labelling(finished: Graph) -> Labelling:
    found = Labelling(Run(finished))
    found.store.path.unlink(missing_ok=True)
    return found


def test_the_queue_draws_where_the_scores_disagree_and_one_in_ten_from_all(labelling: Labelling) -> None:
    queue = labelling.queue(10)
    assert queue == labelling.queue(10)
    assert [reason for _, reason in queue].count("uniform") == (1 if len(queue) == 10 else 0)
    apart = labelling.disagreement()
    far = sorted(apart.values(), reverse=True)[: max(1, round(0.3 * len(apart)))]
    assert all(apart[triplet] >= far[-1] for triplet, reason in queue if reason == "disagreement")
    assert len({triplet for triplet, _ in queue}) == len(queue)


def test_what_people_said_becomes_labelled_triplets(finished: Graph, labelling: Labelling) -> None:
    assert finished.index is not None
    finished.index.run(finished.root, Silent())
    client = TestClient(make_app(labelling.run, ["semi.s0"], {"testserver"}, author="ann"))
    pairs = client.get("/v1/queue?n=3").json()["pairs"]

    def say(n: int, **fields: Any) -> Any:
        body = {"label_id": f"{n:016d}", "triplet_id": pairs[n]["triplet_id"], "reason": pairs[n]["reason"], **fields}
        return client.post("/v1/labels", json=body)

    with pytest.raises(UserError, match="no delta of this run was judged"):
        labelling.freeze()
    assert say(0, verdict="edited", text=" ").status_code == 422
    assert say(0, verdict="right", text="none of them").status_code == 422
    assert say(0, verdict="right", text=pairs[0]["deltas"][0]).status_code == 201
    assert say(1, verdict="edited", text="größer <b>").json()["author"] == "ann"
    assert say(2, verdict="wrong").status_code == 201
    assert client.post("/v1/labels", json={**judged(5).model_dump(), "triplet_id": 5}).status_code == 404
    assert client.get("/v1/labels/summary").json()["counts"] == {"right": 1, "edited": 1, "wrong": 1}
    assert client.get(f"/v1/pairs/images/{pairs[0]['reference_id']}").headers["content-type"] == "image/jpeg"
    assert client.get("/v1/pairs/images/5").status_code == 404
    assert pairs[0]["triplet_id"] not in [pair["triplet_id"] for pair in client.get("/v1/queue?n=3").json()["pairs"]]
    path = labelling.freeze()
    assert path == labelling.freeze()
    assert sorted(row["captions"][0] for row in json.loads(path.read_text())) == sorted([pairs[0]["deltas"][0], "größer <b>"])
    from mining.gallery import keys

    known = keys(labelling.gallery)
    assert all({row["reference"], row["target"]} <= set(known) for row in json.loads(path.read_text()))
