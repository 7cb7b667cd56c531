"""A run's models as a service, each figure beside its goal.

python tests/benchmarks/bench_serve.py ROOT NAME            a finished run, such as that of `make demo`
python tests/benchmarks/bench_serve.py ROOT NAME --equal    alone whether it ranks as evaluate does, for every query and model

A gallery of `--rows` photos is grown from the run's own: each further photo lies between one of them and one of its
nearest. Ratios are of turns in one run. For the other figures the machine has to be idle.
"""

import argparse
import asyncio
import hashlib
import json
import math
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from pathlib import Path

import faiss
import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image
from timing import interleaved

from cir.evaluate import RANKINGS
from cir.metrics import ALIKE, unit
from cir.search import Hits, Matrix, Searcher
from cluster.app.api import Run
from cluster.app.serve.local import local_app, serve_forever
from cluster.artifacts import Output
from cluster.devices import limit_threads
from cluster.monitor import Monitor
from cluster.stage import RunContext as At
from mining import tables
from mining.embeddings import INFO, plain_parts, read_part
from mining.images import decode
from mining.search import Lists

PORT, REQUESTS, MODEL = 8765, 320, "semi.s0"
CLIENTS = 24  # at a time: the service takes 32, 26 of them with photos to decode, and half wait while half are at work
LATENCIES = 600  # requests of an open loop
LOAD = 0.3  # share of the capacity that the open loop asks for
QUERIES, TOP, TURNS, NEAR = 1000, 10, 5, 20
BATCH = 16  # of the bare loop
Request = Callable[[int], list[bytes]]  # the messages of one, each sent when the one before is answered


def report(what: str, value: float, goal: float, unit_name: str = "", least: bool = False) -> None:
    """A figure, its goal, and whether it is met."""
    met = value >= goal if least else value <= goal
    sign = ">=" if least else "<="
    print(f"{what}: {value:.4g}{unit_name} (goal {sign} {goal:g}{unit_name}: {'met' if met else 'NOT met'})", flush=True)


def message(method: str, path: str, body: bytes) -> bytes:
    """A request as it is sent."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def ask(request: Request, count: int, rate: float = math.inf) -> list[float]:
    """CLIENTS make `count` requests, `rate` a second: the seconds of each from when it was due, so that a queue counts.

    They share the server's cores: one thread that only sends and reads takes little of what is measured.
    """
    return asyncio.run(_ask(request, count, rate))


async def _ask(request: Request, count: int, rate: float) -> list[float]:
    began, numbers, seconds = time.perf_counter(), iter(range(count)), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        for i in numbers:
            await asyncio.sleep(began + i / rate - time.perf_counter())
            for sent in request(i):
                writer.write(sent)
                await _answer(reader)
            seconds.append(time.perf_counter() - began - i / rate)
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return seconds


async def _answer(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    content = await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
    if head.split()[1] != b"200":
        raise RuntimeError(f"{head!r} {content[:200]!r}")


@contextmanager
def serving(command: list[str], what: str) -> Iterator[psutil.Process]:
    """A server in a process of its own, ready."""
    began = time.perf_counter()
    server = psutil.Popen([sys.executable, *command])
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/readyz").close()
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError(f"{what}: the server has ended") from None
                time.sleep(0.05)
        seconds = time.perf_counter() - began
        report(f"{what}: ready", seconds, 10, " s")
        private = [one.memory_full_info().uss / 2**20 for one in (server, *server.children(recursive=True))]
        print(f"{what}: {cpu(server):.1f} s of CPU until then, {' + '.join(f'{one:.0f}' for one in private)} MiB of its own")
        yield server
    finally:
        server.terminate()
        server.wait()


class Requests:
    """What clients ask of a run's gallery."""

    def __init__(self, ids: list[int], photos: list[bytes]) -> None:
        self.ids, self.photos = ids, photos
        self.names = [hashlib.sha256(photo).hexdigest() for photo in photos]

    def _search(self, reference: dict[str, object], i: int) -> bytes:
        asked = {"reference": reference, "text": f"in green, {i}", "models": [MODEL], "top": TOP}
        return message("POST", "/v1/search", json.dumps(asked).encode())

    def known(self, i: int) -> list[bytes]:
        """A search from a photo of the gallery."""
        return [self._search({"image_id": self.ids[i % len(self.ids)]}, i)]

    def uploaded(self, i: int) -> list[bytes]:
        """An upload, and a search from it."""
        photo = i % len(self.photos)
        return [message("PUT", "/v1/images", self.photos[photo]), self._search({"upload": self.names[photo]}, i)]


class Bare:
    """The same work without a service: encoder, model and FAISS on batches, with the threads that torch takes."""

    def __init__(self, run: Run, requests: Requests) -> None:
        self.searcher, self.requests = run.searcher, requests
        self.composer, self.matrix = self.searcher.composer(MODEL), self.searcher.matrix(MODEL)

    def _find(self, references: np.ndarray, numbers: range) -> None:
        queries = unit(self.composer.compose(self.composer.prepare(references), [f"in green, {i}" for i in numbers]))
        self.matrix.search(queries, TOP)

    def known(self, numbers: range) -> None:
        """Searches from photos of the gallery."""
        ids = self.requests.ids
        self._find(np.stack([self.searcher.known(ids[i % len(ids)]).vector for i in numbers]), numbers)

    def uploaded(self, numbers: range) -> None:
        """Searches from encoded photos."""
        photos, encoder = self.requests.photos, self.searcher.encoder
        pixels = np.stack([encoder.pixels(decode(photos[i % len(photos)])) for i in numbers])
        self._find(encoder.vectors(pixels), numbers)


def served(request: Request) -> float:
    """Requests a second of CLIENTS that each wait for their answer."""
    began = time.perf_counter()
    ask(request, REQUESTS)
    return REQUESTS / (time.perf_counter() - began)


def bare(work: Callable[[range], object]) -> float:
    """As many a second in batches, one after another."""
    began = time.perf_counter()
    for first in range(0, REQUESTS, BATCH):
        work(range(first, first + BATCH))
    return REQUESTS / (time.perf_counter() - began)


def throughput(what: str, server: psutil.Process, request: Request, work: Callable[[range], object]) -> float:
    """Report the share of the bare loop's, with as many threads as torch takes or with one; returns requests a second."""
    many, shares = torch.get_num_threads(), []
    served(request), work(range(BATCH))
    for threads in sorted({many, 1}, reverse=True):
        limit_threads(threads)
        used = cpu(server)
        turns = [(served(request), bare(work)) for _ in range(TURNS)]
        used = 1000 * (cpu(server) - used) / TURNS / REQUESTS
        ours, alone = (statistics.median(turn) for turn in zip(*turns, strict=True))
        print(f"{what}: {ours:.0f} a second of {used:.1f} ms of CPU, the bare loop {alone:.0f} with {threads} threads")
        shares.append(statistics.median(a / b for a, b in turns))
    limit_threads(many)
    report(f"{what}: throughput", min(shares), 0.7, " of the faster bare loop", least=True)
    return ours


def cpu(process: psutil.Process) -> float:
    """Seconds that a server and its processes have used."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def latency(what: str, request: Request, rate: float, goals: dict[int, float]) -> None:
    """Report percentiles of an open loop."""
    seconds = ask(request, LATENCIES, rate)
    print(f"{what}: {LATENCIES} requests at {rate:.0f} a second, p99 {1000 * np.percentile(seconds, 99):.0f} ms")
    for percent, goal in goals.items():
        report(f"{what}: p{percent}", 1000 * float(np.percentile(seconds, percent)), goal, " ms")


def check_equal(run: Run) -> None:
    """Every query of every model: the ids that evaluate ranked, but for those whose cosines it holds for alike."""
    queries = run.graph.evaluation.benchmark(At(run.graph.root, Monitor())).queries
    for name in run.models:
        ranking = run.graph.output(run.graph.evaluation).read_table(f"rankings/{name}.parquet", RANKINGS)
        asked = [(run.searcher.known(query.reference), query.text) for query in queries]
        composed = np.concatenate([run.searcher.compose(name, asked[i : i + BATCH]) for i in range(0, len(asked), BATCH)])
        same = ties = 0
        for query, vector, expected in zip(queries, composed, ranking["image_ids"].to_pylist(), strict=True):
            found = run.searcher.matrix(name).nearest(vector, len(expected), query.reference)
            same += found.image_ids.tolist() == expected
            ties += found.image_ids.tolist() != expected and _alike(run.searcher.matrix(name), vector, found, expected)
        what = f"{name}: of {len(queries)} queries are ranked as evaluate ranks them"
        report(f"{what} ({ties} of them but for a tie)", same + ties, len(queries), least=True)


def _alike(matrix: Matrix, query: np.ndarray, found: Hits, expected: list[int]) -> bool:
    """Whether at every place stand two images whose cosines differ by less than two ways to compute one."""
    rows = [np.flatnonzero(matrix.image_ids == image_id)[0] for image_id in expected]
    return bool((np.abs(matrix.vectors[rows] @ query - found.scores) <= ALIKE).all())


class Grown(Run):
    """A run whose gallery has more photos."""

    folder: Path

    @cached_property
    def searcher(self) -> Searcher:
        """Over what `grow` wrote."""
        embeddings, gallery = (Output(str(self.folder / role)) for role in ("embeddings", "gallery"))
        config = self.graph.config
        return Searcher(self.models, embeddings, gallery, config.embed.towers[config.train.tower])

    @cached_property
    def thumbnails(self) -> dict[int, bytes]:  # type: ignore[override]
        """One for all."""
        return dict.fromkeys(self.searcher._rows["image_id"].to_pylist(), b"")


def grow(run: Run, rows: int, folder: Path) -> None:
    """Write embeddings and a gallery of `rows` images: the run's own, and others between each and those near it."""
    embeddings = run.graph.output(run.graph.evaluation.parents["embeddings"])
    own = np.concatenate([read_part(embeddings, part)[1].mean(1, dtype=np.float32) for part in plain_parts(embeddings)])
    vectors = unit(own - own.mean(0))
    near = faiss.knn(vectors, vectors, NEAR + 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 1:]
    rng = np.random.default_rng(0)
    first = rng.integers(len(own), size=rows - len(own))
    second, share = near[first, rng.integers(NEAR, size=len(first))], rng.uniform(0, 0.5, (len(first), 1)).astype(np.float32)
    values = np.concatenate([own, own[first] + share * (own[second] - own[first])]).astype(np.float16)
    made, gallery = (Output(str(folder / role)) for role in ("embeddings", "gallery"))
    made.write_json(INFO, embeddings.read_json(INFO) | {"tokens": 1})
    ids, ones = pa.array(np.arange(rows)), pa.array(np.ones(rows, np.int16))
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    columns = {"image_id": ids, "view": pa.array(np.zeros(rows, np.int16)), "tokens": ones, "values": column}
    made.write_table("part-00000.v0.parquet", pa.table(columns), tables.embeddings(1, values.shape[1]))
    keys = {"image_id": ids, "key": pa.array(map(str, range(rows)))}
    nothing = {field.name: pa.nulls(rows, field.type) for field in tables.GALLERY if field.name not in keys}
    gallery.write_table("part-00000.parquet", pa.table({**keys, **nothing}).select(tables.GALLERY.names), tables.GALLERY)


def grown(root: str, name: str, folder: str) -> Grown:
    """The run over the gallery that `grow` wrote."""
    run = Grown.open(root, name)
    assert isinstance(run, Grown)
    run.folder = Path(folder)
    return run


def own_gallery(root: str, name: str, run: Run) -> None:
    """The service over the run's gallery."""
    ids = list(run.thumbnails)
    requests = Requests(ids, [run.thumbnails[i] for i in ids])
    with serving([__file__, root, name, "--serve"], f"{len(ids):,} photos") as server:
        loop = Bare(run, requests)
        rate = throughput("a photo of the gallery", server, requests.known, loop.known)
        latency("a photo of the gallery", requests.known, LOAD * rate, {50: 30, 95: 80})
        rate = throughput("an upload with its search", server, requests.uploaded, loop.uploaded)
        latency("an upload with its search", requests.uploaded, LOAD * rate, {50: 120})
        large = Requests(ids, [_large(photo) for photo in requests.photos[:50]])
        latency("an upload of 2,000 pixels with its search", large.uploaded, LOAD * rate / 4, {50: 120})


def _large(photo: bytes) -> bytes:
    image = Image.open(BytesIO(photo))
    stream = BytesIO()
    image.resize((2000, 2000 * image.height // image.width)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def large_gallery(root: str, name: str, run: Run, rows: int) -> None:
    """The index and the service over a grown gallery."""
    with tempfile.TemporaryDirectory() as folder:
        grow(run, rows, Path(folder))
        larger = grown(root, name, folder)
        began = time.perf_counter()
        matrix = larger.searcher.matrix(MODEL)
        larger.searcher.known(0)
        print(
            f"{rows:,} photos: their features, vectors and lists are made in {time.perf_counter() - began:.0f} s, once a node"
        )
        queries = composed(larger)
        exact = faiss.knn(queries, matrix.vectors, TOP, metric=faiss.METRIC_INNER_PRODUCT)[1]
        found = matrix.search(queries, TOP)[0]
        recall = np.mean([len(np.intersect1d(*pair)) / TOP for pair in zip(exact, found, strict=True)])
        report(f"{rows:,} photos: recall@{TOP} of {len(queries):,} composed queries", float(recall), 0.99, least=True)
        ours, other = interleaved(lambda: matrix.search(queries, TOP), lambda: raw(matrix, queries), TURNS)
        report(f"{rows:,} photos: {len(queries):,} searches", ours / other, 1.2, " of raw FAISS")
        requests = Requests(list(range(rows)), [])
        with serving([__file__, root, name, "--serve", "--grown", folder], f"{rows:,} photos"):
            served(requests.known)
            latency(f"{rows:,} photos, one of the gallery", requests.known, LOAD * served(requests.known), {50: 30, 95: 80})


def composed(run: Run) -> np.ndarray:
    """Queries of MODEL: the references and texts of the evaluation."""
    asked = run.graph.evaluation.benchmark(At(run.graph.root, Monitor())).queries[:QUERIES]
    own = Run(run.graph).searcher
    composer = own.composer(MODEL)
    references = composer.prepare(np.stack([own.known(query.reference).vector for query in asked]))
    return unit(composer.compose(references, [query.text for query in asked]))


def raw(matrix: object, queries: np.ndarray) -> None:
    """The same lists and rescoring, by FAISS and numpy alone."""
    if not isinstance(matrix.search, Lists):
        faiss.knn(queries, matrix.vectors, TOP, metric=faiss.METRIC_INNER_PRODUCT)
        return
    rows = matrix.search.lists.search(queries, TOP)[1]
    scores = np.einsum("qd,qkd->qk", queries, matrix.vectors[rows])
    np.take_along_axis(rows, np.argsort(-scores, axis=1), 1)


def main() -> None:
    """Print the figures that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("name", nargs="?", default="demo")
    parser.add_argument("--rows", type=int, default=100_000, help="photos of the grown gallery; 0: none")
    parser.add_argument("--equal", action="store_true", help="alone compare the rankings")
    parser.add_argument("--serve", action="store_true", help="alone serve; the benchmark starts this itself")
    parser.add_argument("--grown", help="the folder of a grown gallery")
    arguments = parser.parse_args()
    at = arguments.root, arguments.name
    run = grown(*at, arguments.grown) if arguments.grown else Run.open(*at)
    if arguments.serve:
        serve_forever(local_app(run, [MODEL], [], None, "bench"), "127.0.0.1", PORT, None)
        return
    if arguments.equal:
        check_equal(run)
        return
    own_gallery(arguments.root, arguments.name, run)
    if arguments.rows:
        large_gallery(arguments.root, arguments.name, run, arguments.rows)


if __name__ == "__main__":
    main()
