"""Which pairs people see, and what is kept of their answers."""

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs as pafs
from starlette.testclient import TestClient

from cluster.app.api import Run
from cluster.app.config import RunConfig
from cluster.app.graph import Graph
from cluster.app.labels import Found, Judged, Labelling, Store, Teaching, freeze, precision
from cluster.app.serve.app import make_app
from cluster.artifacts import Output
from cluster.driver.lineage import Lineage
from cluster.errors import UserError
from cluster.monitor import Monitor
from tests.cluster.app.test_cli import invoke

READ = Output.read_parts


def judged(n: int, verdict: str = "right", **fields: Any) -> Judged:
    fields = {"label_id": f"{n:016d}", "triplet_id": n, "reason": "uniform"} | fields
    return Judged(verdict=verdict, **fields)  # type: ignore[arg-type]


def said(n: int, verdict: str = "right", **fields: Any) -> dict[str, Any]:
    """What the store is given of a judgement."""
    return judged(n, verdict, **fields).model_dump() | {"reference_id": 2, "target_id": 3}


@pytest.fixture(scope="module")
def opened(finished: Graph) -> Run:
    return Run(finished)


@pytest.fixture(scope="module")
def client(opened: Run) -> TestClient:
    """One service for all, as its processes load for seconds."""
    return TestClient(make_app(opened, ["semi.s0"], {"testserver"}, author="ann"))


@pytest.fixture
def run(finished: Graph) -> Run:
    """The finished run, without labels."""
    run = Run(finished)
    system, folder = pafs.LocalFileSystem(), str(Path(finished.root) / "labels")
    system.create_dir(folder)
    system.delete_dir_contents(folder)
    return run


@pytest.fixture
def store(run: Run) -> Store:
    return Store(run)


def test_a_label_that_comes_twice_is_kept_once(run: Run, store: Store) -> None:
    first = store.add(said(1, text="red"), "ann", "d")
    assert store.add(said(1, "wrong"), "bob", "d") == first
    assert Store(run).add(said(1, "wrong"), "bob", "d") == first
    assert list(store) == list(Store(run)) == [first]
    assert {"author", "time", "digest", "reason"} <= set(first)


def test_what_another_process_adds_is_seen_and_what_it_left_half_written_is_not(run: Run, store: Store) -> None:
    store.add(said(1), "ann", "d")
    Store(run).add(said(2), "bob", "d")
    Path(store.folder.path(f".3.json.{'0' * 32}")).write_text('{"label_id": "')
    assert [label["author"] for label in store] == ["ann", "bob"]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\r\n", "\ud800"])
def test_a_text_may_hold_any_character(run: Run, store: Store, mark: str) -> None:
    store.add(said(1, "edited") | {"text": f"red{mark}big"}, "ann", "d")
    assert [label["text"] for label in Store(run)] == [f"red{mark}big"]


def test_labels_that_come_at_once_are_all_kept(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.add(said(n % 20), "ann", "d"), range(100)))
    assert len(list(store)) == 20


def test_the_last_label_counts_and_undoing_takes_it_back(store: Store) -> None:
    judgements = [(1, "right", "d"), (1, "wrong", "d"), (2, "right", "d"), (2, "undone", "d"), (3, "right", "e")]
    for n, (triplet, verdict, digest) in enumerate(judgements):
        store.add(said(n, verdict, triplet_id=triplet), "ann", digest)
    assert {triplet: label["verdict"] for triplet, label in store.last("d").items()} == {1: "wrong"}
    assert set(store.last()) == {1, 3}


def test_precision_has_wilsons_interval() -> None:
    found = precision({"verdict": verdict} for verdict in ["right"] * 8 + ["edited", "wrong", "skip"])
    assert found is not None
    assert (found.judged, found.share) == (10, 0.8)
    assert (found.low, found.high) == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson's interval of 8 in 10
    assert str(found) == "80% of the generator's deltas are right (49% to 94%, of 10)"
    assert precision([]) is None


@pytest.fixture
def labelling(run: Run) -> Labelling:
    return Labelling(run)


def say(labelling: Labelling, triplet: int, reason: str, verdict: str = "no_change") -> None:
    fields: Any = {"label_id": f"{triplet:020d}", "triplet_id": triplet, "reason": reason, "verdict": verdict}
    labelling.judge(Judged(**fields), "ann")


def test_the_queue_draws_where_the_scores_disagree_and_one_in_ten_from_all(labelling: Labelling) -> None:
    queue = labelling.queue(10)
    assert queue == labelling.queue(10)
    assert labelling.order[0] in dict(queue)
    disputed = sorted(labelling.apart.values(), reverse=True)[: round(0.3 * len(labelling.rows))]
    drawn = [triplet for triplet, reason in queue if reason == "disagreement"]
    assert len(drawn) >= min(9, len(disputed))
    assert all(labelling.apart[triplet] >= disputed[-1] for triplet in drawn)
    assert len(dict(queue)) == 10


def test_every_pair_is_drawn_once_and_then_none(labelling: Labelling) -> None:
    seen = []
    while queue := labelling.queue(1):
        seen.append(queue[0][0])
        say(labelling, *queue[0])
    assert sorted(seen) == sorted(labelling.rows)
    assert labelling.precision() is not None


def test_the_measured_pairs_are_a_uniform_sample_of_all(run: Run) -> None:
    """A disputed pair is as often among them as any other, though most of the disputed are judged for another reason."""
    measured: Counter[bool] = Counter()
    rows = {triplet: {"reference_id": 1, "target_id": 2, "deltas": []} for triplet in range(100)}
    for seed in range(60):
        labelling = Labelling(run, seed)
        labelling.rows, labelling.order = rows, np.random.default_rng(seed).permutation(100).tolist()
        labelling.apart = {triplet: float(triplet < 30) for triplet in rows}
        labelling.store = Memory()
        for _ in range(40):
            triplet, reason = labelling.queue(1)[0]
            say(labelling, triplet, reason, "wrong" if triplet < 30 else "skip")
        sample = labelling.order[:4]
        assert set(sample) <= set(labelling.labels())
        measured.update(triplet < 30 for triplet in sample)
        found = labelling.precision()
        assert (found.judged if found else 0) == sum(triplet < 30 for triplet in sample)
    share = measured[True] / measured.total()
    assert abs(share - 0.3) < 3 * (0.3 * 0.7 / measured.total()) ** 0.5


class Memory(Store):
    """Labels without a disk."""

    def __init__(self) -> None:
        self.labels: dict[int, dict[str, Any]] = {}

    def add(self, label: dict[str, Any], author: str, digest: str) -> dict[str, Any]:
        self.labels[label["triplet_id"]] = label
        return label

    def last(self, digest: str | None = None) -> dict[int, dict[str, Any]]:
        return self.labels


def test_what_people_said_of_pairs(run: Run, client: TestClient) -> None:
    pairs = client.get("/v1/queue?n=3").json()["pairs"]

    def say(n: int, **fields: Any) -> Any:
        body = {"label_id": f"{n:016d}", "triplet_id": pairs[n]["triplet_id"], "reason": pairs[n]["reason"], **fields}
        return client.post("/v1/labels", json=body)

    with pytest.raises(UserError, match="no delta or result of this run was judged right"):
        freeze(run)
    assert say(0, verdict="edited", text=" ").status_code == 422
    assert say(0, verdict="right", text="none of them").status_code == 422
    assert say(0, verdict="right", text=pairs[0]["deltas"][0]).status_code == 201
    assert say(1, verdict="edited", text="größer <b>").json()["author"] == "ann"
    assert say(2, verdict="wrong").status_code == 201
    assert client.post("/v1/labels", json=judged(5).model_dump()).status_code == 404
    assert client.get("/v1/labels/summary").json()["counts"] == {"right": 1, "edited": 1, "wrong": 1}
    assert client.get(f"/v1/pairs/images/{pairs[0]['reference_id']}").headers["content-type"] == "image/jpeg"
    assert client.get("/v1/pairs/images/5").status_code == 404
    assert pairs[0]["triplet_id"] not in [pair["triplet_id"] for pair in client.get("/v1/queue?n=3").json()["pairs"]]
    (frozen,) = freeze(run)
    assert (frozen.gallery, frozen.rows, frozen.authors) == ("photos", 2, {"ann": 2})
    assert freeze(run) == [frozen]
    rows = json.loads(Path(frozen.file).read_text())
    assert sorted(row["captions"][0] for row in rows) == sorted([pairs[0]["deltas"][0], "größer <b>"])


def test_a_result_that_is_right_is_a_triplet_of_the_gallery_that_trains(run: Run, client: TestClient) -> None:
    start = client.get("/v1/gallery").json()["images"][0]["image_id"]
    body = {"reference": {"image_id": start}, "text": "make it red", "models": ["semi.s0"]}
    hit = client.post("/v1/search", json=body).json()["answers"][0]["hits"][0]
    taught = {"label_id": "a" * 16, "reference_id": start, "target_id": hit["image_id"], "text": "make it red"}

    def teach(**changes: Any) -> int:
        return client.post("/v1/labels/results", json=taught | changes).status_code

    assert [teach(), teach()] == [201, 201]
    assert teach(label_id="b" * 16, target_id=5) == 404
    assert teach(label_id="b" * 16, target_id=start) == 422
    assert teach(label_id="b" * 16, text=" ") == 422
    assert teach(label_id="b" * 16, verdict="wrong") == 422
    fields = ("reference_id", "target_id", "text")
    assert client.get("/v1/labels/results").json()["results"] == [{name: taught[name] for name in fields}]
    (frozen,) = freeze(run)
    names = run.searcher.keys(np.array([int(start), int(hit["image_id"])]))
    assert frozen.gallery == "photos"  # whose photos these are too, by their bytes
    row = {"reference": names[0], "target": names[1], "captions": ["make it red"], "author": "ann"}
    assert json.loads(Path(frozen.file).read_text()) == [row]
    assert teach(label_id="c" * 16, verdict="undone") == 201
    assert client.get("/v1/labels/results").json()["results"] == []


def test_results_that_no_training_gallery_holds_are_a_file_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [int(image_id) for image_id in run.searcher.matrix("semi.s0").image_ids[:2]]
    found = Found(label_id="0" * 16, reference_id=ids[0], target_id=ids[1], text="in red")
    Teaching(run).judge(found, "ann")
    monkeypatch.setattr(Output, "read_parts", other_bytes)
    (frozen,) = freeze(run)
    assert frozen.gallery == "evaluate"


def other_bytes(gallery: Output, *arguments: Any) -> pa.Table:
    """As `Output.read_parts`; the images of all galleries but the one that is searched have other bytes."""
    table = READ(gallery, *arguments)
    if "sha256" not in table.column_names or "evaluate" in gallery.uri:
        return table
    others = pa.array([f"other {digest}" for digest in table["sha256"].to_pylist()])
    return table.set_column(table.column_names.index("sha256"), "sha256", others)


def test_lineage_shows_whose_labels_a_run_learned_from(run: Run) -> None:
    labelling = Labelling(run)
    for n, author in enumerate(["ann", "bob", "bob"]):
        labelling.judge(judged(n, "edited", text="in red", triplet_id=labelling.order[n]), author)
    (frozen,) = freeze(run)
    content = run.graph.config.model_dump(mode="json")
    labelled = content["ingest"]["triplets"]["labelled"]
    content["ingest"]["triplets"]["taught"] = labelled | {"file": [*labelled["file"], frozen.file]}
    content["train"]["variants"], content["rounds"] = {"supervised": {"triplets": "taught"}}, {}
    graph = Graph(RunConfig.model_validate(content))
    graph["ingest:taught"].run(graph.root, Monitor())
    assert graph["ingest:taught"] in graph["train:supervised.s0"].parents.values()
    (made,) = Lineage(graph.root).find("ingest:taught")
    assert made.authors == {"ann": 1, "bob": 2}
    assert "(43 rows, 1 by ann, 2 by bob)" in invoke("lineage", graph.root, "ingest:taught")
    page = Path(graph.root) / "lineage.html"
    invoke("lineage", graph.root, "ingest:taught", "--html", str(page))
    assert "1 by ann, 2 by bob" in page.read_text()
    page.unlink()
    shutil.rmtree(graph.output(graph["ingest:taught"]).uri)  # other tests use this root


def test_the_command_lists_and_freezes(run: Run, config: str) -> None:
    assert "nothing is known of the generator's precision" in invoke("labels", "list", config)
    labelling = Labelling(run)
    for triplet in labelling.order[:10]:
        fields = {"label_id": f"{triplet:020d}", "triplet_id": triplet, "text": labelling.rows[triplet]["deltas"][0]}
        labelling.judge(judged(0, **fields), "ann")
    listed = invoke("labels", "list", config)
    assert '"author": "ann"' in listed
    assert "100% of the generator's deltas are right (21% to 100%, of 1)" in listed
    frozen = invoke("labels", "freeze", config)
    assert "10 labelled triplets (10 by ann) of the gallery 'photos'" in frozen
