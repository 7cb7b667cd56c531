"""A run's models as a service: time to ready, latency in an open loop, throughput beside the bare models.

python tests/benchmarks/bench_serve.py ROOT NAME            a finished run, such as that of `make demo`
python tests/benchmarks/bench_serve.py --rows 100000        the search alone beside raw FAISS, and its recall
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_neighbours import write_vectors
from timing import interleaved

from cir.evaluate import RANKINGS
from cir.search import Matrix
from cluster.app.api import Run
from cluster.monitor import Silent
from cluster.stage import Run as At
from mining.search import Lists

PORT, CLIENTS, REQUESTS, MODEL = 8765, 16, 400, "semi.s0"
LOAD = 0.3  # share of the capacity that the open loop asks for
QUERIES, TOP, TURNS = 1000, 10, 5
HEADERS = {"content-type": "application/json"}


def ask(method: str, path: str, body: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        connection.request(method, path, body, HEADERS)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
        return content
    finally:
        connection.close()


def until_ready() -> None:
    while True:
        try:
            ask("GET", "/readyz")
            return
        except OSError:
            time.sleep(0.05)


def throughput(request: Callable[[int], object]) -> float:
    """Requests a second of CLIENTS that each wait for their answer."""
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(request, range(REQUESTS)))
    return REQUESTS / (time.perf_counter() - began)


def open_loop(request: Callable[[int], object], rate: float) -> str:
    """Percentiles of the time from when a request was due: a queue counts."""
    began = time.perf_counter()

    def timed(i: int) -> float:
        due = began + i / rate
        time.sleep(max(0.0, due - time.perf_counter()))
        request(i)
        return time.perf_counter() - due

    with ThreadPoolExecutor(CLIENTS) as pool:
        seconds = list(pool.map(timed, range(REQUESTS)))
    return ", ".join(f"p{p} {1000 * np.percentile(seconds, p):.0f} ms" for p in (50, 95, 99)) + f" at {rate:.0f} a second"


def check_equal(run: Run) -> None:
    """Every query of every model: the ids that evaluate ranked."""
    queries = run.graph.evaluation.benchmark(At(run.graph.root, Silent())).queries
    for name in run.models:
        ranking = run.graph.output(run.graph.evaluation).read_table(f"rankings/{name}.parquet", RANKINGS)
        same = 0
        for query, expected in zip(queries, ranking["image_ids"].to_pylist(), strict=True):
            found = run.searcher.search(name, run.searcher.known(query.reference), query.text, len(expected))
            same += found.image_ids.tolist() == expected
        print(f"{name}: {same} of {len(queries)} queries are ranked as evaluate ranks them")


def service(root: str, name: str) -> None:
    run = Run.open(root, name)
    check_equal(run)
    thumbnails, began = run.thumbnails, time.perf_counter()
    ids = list(thumbnails)
    command = [sys.executable, "-m", "cluster.app", "serve", str(Path(root) / "runs" / name / "config.yaml")]
    server = subprocess.Popen([*command, "--set", f"root={root}", "--port", str(PORT), "--models", MODEL])
    try:
        until_ready()
        print(f"ready in {time.perf_counter() - began:.1f} s, {len(ids):,} photos")

        def search(i: int) -> bytes:
            asked = {"reference": {"image_id": ids[i % len(ids)]}, "text": f"in green, {i}", "models": [MODEL], "top": TOP}
            return ask("POST", "/v1/search", json.dumps(asked).encode())

        def upload(i: int) -> None:
            name = json.loads(ask("PUT", "/v1/images", thumbnails[ids[i % len(ids)]]))["upload"]
            asked = {"reference": {"upload": name}, "text": f"in green, {i}", "models": [MODEL], "top": TOP}
            ask("POST", "/v1/search", json.dumps(asked).encode())

        def bare(i: int) -> None:
            run.searcher.search(MODEL, run.searcher.known(ids[i % len(ids)]), f"in green, {i}", TOP)

        bare(0)
        turns = [(throughput(search), throughput(bare)) for _ in range(3)]
        served, alone = (statistics.median(turn) for turn in zip(*turns, strict=True))
        print(f"throughput: {served:.0f} a second, {served / alone:.2f} of the bare model's {alone:.0f}")
        print(f"a photo of the gallery: {open_loop(search, LOAD * served)}")
        print(f"an upload: {open_loop(upload, LOAD * throughput(upload))}")
    finally:
        server.terminate()
        server.wait()


def index(rows: int) -> None:
    import faiss

    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        vectors = write_vectors(Path(folder) / "vectors.npy", rows)
        matrix = Matrix(np.arange(rows), vectors)
        rng = np.random.default_rng(0)  # a query is about as far from its image as from that image's cluster
        queries = vectors[rng.choice(rows, QUERIES)] + rng.standard_normal((QUERIES, vectors.shape[1])).astype(np.float32) / 16
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        exact = faiss.knn(queries, vectors, TOP, metric=faiss.METRIC_INNER_PRODUCT)[1]
        found = matrix.search(queries, TOP)[0]
        recall = np.mean([len(np.intersect1d(*pair)) / TOP for pair in zip(exact, found, strict=True)])

        def raw() -> None:
            if not isinstance(matrix.search, Lists):
                faiss.knn(queries, vectors, TOP, metric=faiss.METRIC_INNER_PRODUCT)
                return
            rows = matrix.search.lists.search(queries, TOP)[1]
            scores = np.einsum("qd,qkd->qk", queries, vectors[rows])
            np.take_along_axis(rows, np.argsort(-scores, axis=1), 1)

        ours, other = interleaved(lambda: matrix.search(queries, TOP), raw, TURNS)
        single = [_seconds(lambda query=query: matrix.nearest(query, TOP, None)) for query in queries[:200]]
        tempfile.tempdir = None
    print(
        f"{rows:,} vectors: recall@{TOP} {recall:.4f}, {ours / other:.2f} of raw FAISS, one query p50 "
        f"{1000 * np.percentile(single, 50):.1f} ms, p95 {1000 * np.percentile(single, 95):.1f} ms"
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print the figures that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?")
    parser.add_argument("name", nargs="?", default="demo")
    parser.add_argument("--rows", type=int, default=30_000)
    arguments = parser.parse_args()
    if arguments.root:
        service(arguments.root, arguments.name)
    else:
        index(arguments.rows)


if __name__ == "__main__":
    main()
