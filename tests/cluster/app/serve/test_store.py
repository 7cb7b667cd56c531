"""A run whose outputs lie in an object store, served as one on a disk."""

from collections.abc import Iterator

import pytest
from pyarrow import fs as pafs
from starlette.testclient import TestClient

from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.app.labels import Store, freeze
from cluster.app.runner import run_folder
from cluster.app.serve.app import make_app
from cluster.artifacts import filesystem
from mining.rows import read_rows
from tests.s3 import bucket


@pytest.fixture(scope="module")
def stored(finished: Graph) -> Iterator[Run]:
    """The finished run, copied into a bucket."""
    with bucket() as root:
        system, base = filesystem(root)
        for folder in (*map(finished.output, [*finished.stages, *finished.beside]), run_folder(finished.config)):
            place = f"{base}/{folder.uri.removeprefix(finished.root.rstrip('/') + '/')}"
            pafs.copy_files(folder.uri, place, pafs.LocalFileSystem(), system)
        yield Run.open(root, finished.config.name)


def test_it_is_searched_explained_and_labelled(stored: Run, finished: Graph) -> None:
    client = TestClient(make_app(stored, ["supervised.s0", "semi.s0"], {"testserver"}, author="ann"))
    start = client.get("/v1/gallery").json()["images"][0]["image_id"]
    body = {"reference": {"image_id": start}, "text": "make it red", "models": ["semi.s0"], "top": 5}
    hits = client.post("/v1/search", json=body).json()["answers"][0]["hits"]
    expected = Run(finished).search(int(start), "make it red", "semi.s0", top=5)
    assert [hit["key"] for hit in hits] == [hit.key for hit in expected]
    for path in (f"/v1/images/{start}/thumbnail", f"/v1/images/{start}"):
        assert client.get(path).headers["content-type"] == "image/jpeg"
    candidate = hits[0]["image_id"]
    assert client.post("/v1/explain", json={"reference": {"image_id": start}, "candidate": candidate}).status_code == 200
    pair = client.get("/v1/queue?n=1").json()["pairs"][0]
    said = {
        "label_id": "0" * 16,
        "triplet_id": pair["triplet_id"],
        "reason": pair["reason"],
        "verdict": "edited",
        "text": "in red",
    }
    assert [client.post("/v1/labels", json=said).status_code for _ in range(2)] == [201, 201]
    taught = {"label_id": "1" * 16, "reference_id": start, "target_id": candidate, "text": "make it red"}
    assert client.post("/v1/labels/results", json=taught).status_code == 201
    assert [label["label_id"] for label in Store(stored)] == ["0" * 16, "1" * 16]
    (frozen,) = freeze(stored)
    rows = read_rows(frozen.file)
    assert [row["author"] for row in rows] == ["ann", "ann"]
