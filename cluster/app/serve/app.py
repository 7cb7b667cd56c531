"""The routes: FastAPI over a run. It runs under any ASGI server."""

import hashlib
import json
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from cir.index import thumbnail
from cir.search import Hits, Reference
from cir.train import ModelName
from cluster.app.api import Run
from cluster.app.labels import Found, Judged, Label, Labelling, Teaching
from cluster.app.serve.admission import Admission
from cluster.app.serve.batching import Batching
from cluster.app.serve.child import Ended
from cluster.app.serve.guard import UPLOAD_BYTES, Guard
from cluster.app.serve.models import Batch, EncoderProcess, OneSearch, Took, finder
from cluster.artifacts import Output
from cluster.errors import Rejected, UserError
from mining.gallery import read_images
from mining.images import decode

UPLOAD_PIXELS = 50_000_000
UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP")  # what browsers send: the fewer parsers a stranger reaches the better
UPLOADS = 256  # whose vectors are kept
SHOWN_SIDE = 1024  # pixels of the longer side of an image that is shown large
DECODED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # images at a time
DECODING, EXPLAINING = 24, 4  # requests that may wait for their turn
SAMPLE = 24
PAGE = Path(__file__).parent / "page"
FILES = {"index.html": "text/html; charset=utf-8", "page.js": "text/javascript", "page.css": "text/css"}
IMMUTABLE = {"cache-control": "private, max-age=31536000, immutable"}
ImageId = Annotated[int, InPath(ge=0, lt=2**63)]


class Body(BaseModel):
    """A part of a request; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class From(Body):
    """Where a search starts: an image of the gallery, or an upload by its SHA-256."""

    image_id: int | None = Field(None, ge=0, lt=2**63)
    upload: str | None = Field(None, pattern="^[0-9a-f]{64}$")


class Asked(Body):
    """A search."""

    reference: From
    text: str = Field(min_length=1, max_length=512)
    models: list[str] = Field(min_length=1, max_length=4)
    top: int = Field(20, ge=1, le=100)
    exclude_reference: bool = True


class Pair(Body):
    """A pair to explain: where a search starts, and what it found."""

    reference: From
    candidate: int = Field(ge=0, lt=2**63)


class Uploads:
    """The vectors of the last uploads, by the SHA-256 of their files."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Reference] = OrderedDict()
        self._lock = Lock()

    def keep(self, name: str, reference: Reference) -> None:
        """The oldest one goes where there are too many."""
        with self._lock:
            self._kept[name] = reference
            self._kept.move_to_end(name)
            if len(self._kept) > UPLOADS:
                self._kept.popitem(last=False)

    def get(self, name: str) -> Reference | None:
        """None where it is not, or no longer, known."""
        with self._lock:
            return self._kept.get(name)


class Service:
    """A run, the uploads whose vectors are kept, and the histogram of each step."""

    def __init__(self, run: Run, models: list[str], uploads: Uploads) -> None:
        """Loads the models and what they search."""
        self.run, self.models, self.searcher, self.uploads = run, models, run.searcher, uploads
        encodes, finds = (ThreadPoolExecutor(1, name) for name in ("encode", "find"))
        self.finder = finder(self.searcher, models)
        self.searcher.encoder = EncoderProcess(self.searcher.encoder.tower, encodes)
        self.finding = {name: Batching(partial(self._find, name), finds) for name in models}
        self.digests = {name: run.graph.evaluation.parents[f"models.{name}"].digest for name in models}
        self.registry = CollectorRegistry()
        self._steps = Histogram("vdg_step_seconds", "Time of a step", ["step"], registry=self.registry)
        self.decoding, self.explaining = Admission(DECODED, DECODING), Admission(1, EXPLAINING)
        self.thumbnails = run.thumbnails
        self._warm()

    def _warm(self) -> None:
        """Both processes load, side by side. Raises UserError where one cannot."""
        first = self.searcher.known(next(iter(self.thumbnails)))
        size = self.searcher.encoder.tower.image_size
        try:
            with ThreadPoolExecutor(1) as beside:
                encoded = beside.submit(self.searcher.encoder.encode, np.zeros((size, size, 3), np.uint8))
                for model in self.models:
                    self.finding[model](OneSearch(first, "warm", 1, None))
                encoded.result()
        except Ended as error:
            raise UserError(f"the models cannot be loaded: {error}") from error

    @contextmanager
    def step(self, name: str, took: dict[str, float]) -> Iterator[None]:
        """Time a step into the histogram and into `took`, in ms."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._steps.labels(name).observe(seconds)
        took[name] = round(took.get(name, 0) + 1000 * seconds, 3)

    def upload(self, content: bytes) -> dict[str, Any]:
        """Keep an image's vector. Raises Rejected."""
        took: dict[str, float] = {}
        with self.decoding.take(), self.step("decode", took):
            image = decode(content, UPLOAD_PIXELS, UPLOAD_FORMATS)
            (width, height), pixels = image.size, self.searcher.encoder.pixels(image)
            del image
        with self.step("encode", took):
            reference = self.searcher.uploaded(content, pixels)
        name = hashlib.sha256(content).hexdigest()
        self.uploads.keep(name, reference)
        known = None if reference.image_id is None else str(reference.image_id)
        return {"upload": name, "image_id": known, "width": width, "height": height, "took_ms": took}

    def explain(self, pair: Pair) -> dict[str, Any]:
        """What the generator says of it. Raises KeyError, UserError."""
        took: dict[str, float] = {}
        reference = self.reference(pair.reference)
        with self.explaining.take(), self.step("explain", took):
            said = self.run.explain(reference, pair.candidate)
        return asdict(said) | {"took_ms": took}

    def shown(self, gallery: Output, image_id: int, side: int) -> Response:
        """A JPEG of at most `side` pixels a side, whatever the file is."""
        with self.decoding.take():
            content = thumbnail(read_images((gallery,), [image_id])[image_id], side)
        return Response(content, media_type="image/jpeg", headers=IMMUTABLE)

    def reference(self, asked: From) -> Reference:
        """Raises KeyError where it is not known."""
        if asked.upload is not None:
            if (kept := self.uploads.get(asked.upload)) is None:
                raise KeyError(asked.upload)
            return kept
        assert asked.image_id is not None
        return self.searcher.known(asked.image_id)

    def search(self, asked: Asked) -> dict[str, Any]:
        """The answer. Raises KeyError where the reference is not known."""
        took: dict[str, float] = {}
        with self.step("reference", took):
            reference = self.reference(asked.reference)
        without = reference.image_id if asked.exclude_reference else None
        answers = []
        for name in dict.fromkeys(asked.models):
            found, steps = self.finding[name](OneSearch(reference, asked.text, asked.top, without))
            took |= {step: round(took.get(step, 0) + 1000 * seconds, 3) for step, seconds in steps.items()}
            # ids are strings: JavaScript's numbers are too short
            hits = [asdict(hit) | {"image_id": str(hit.image_id)} for hit in self.run.hits(found)]
            answers.append({"model": name, "digest": self.digests[name], "hits": hits})
        return {"answers": answers, "took_ms": took}

    def _find(self, name: str, searches: list[OneSearch]) -> list[tuple[Hits, Took]]:
        """What a model finds for each of a batch, and the batch's steps."""
        found, took = self.finder(Batch(name, searches))
        for step, seconds in took.items():
            self._steps.labels(step).observe(seconds)
        return [(hits, took) for hits in found]


def make_app(
    run: Run,
    models: list[str],
    hosts: Collection[str],
    token: str | None = None,
    author: str = "unknown",
    uploads: Uploads | None = None,
) -> FastAPI:
    """The app, its models loaded. `author` is whose labels are kept; `uploads` may be shared with other processes."""
    service = Service(run, models, uploads or Uploads())
    app = FastAPI(title="Visual Delta", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=hosts, token=token)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Ended, _ended)
    _add_state(app, service)
    _add_search(app, service)
    _add_explain(app, service)
    _add_images(app, service)
    _add_results(app, Teaching(run), author)
    if run.pseudo_triplets is not None:
        _add_labels(app, service, Labelling(run), author)
    _add_page(app)
    return app


def _invalid(request: Request, error: Exception) -> Response:
    """What is wrong, without the input, which may hold what no JSON answer can: NaN, half of a surrogate pair."""
    assert isinstance(error, RequestValidationError)
    detail = [{name: found[name] for name in ("type", "loc", "msg")} for found in error.errors()]
    return Response(json.dumps({"detail": detail}), 422, media_type="application/json")


def _ended(request: Request, error: Exception) -> Response:
    """The process starts again with the next request."""
    detail = {"detail": "the models have to be started again; try again"}
    return Response(json.dumps(detail), 503, {"retry-after": "10"}, "application/json")


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    @app.get("/readyz")
    def ready() -> dict[str, str]:
        """The models are loaded before the first request."""
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        """Of every step, for Prometheus."""
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """What can be asked, and what the evaluation says of it."""
        table = service.run.metrics()
        rows = [
            {"model": name, "digest": digest, "metrics": table.get(ModelName.parse(name).variant, {})}
            for name, digest in service.digests.items()
        ]
        name, explains = service.run.graph.config.name, service.run.pseudo_triplets is not None
        return {"run": name, "images": len(service.thumbnails), "models": rows, "explains": explains}


def _add_search(app: FastAPI, service: Service) -> None:
    @app.put("/v1/images")
    async def upload(request: Request) -> dict[str, Any]:
        """A JPEG, PNG or WebP as the raw body. Its vector is kept for a while, its pixels are not."""
        content = await _body(request)
        try:
            return await run_in_threadpool(service.upload, content)
        except Rejected as error:
            raise HTTPException(422, str(error)) from error

    @app.post("/v1/search")
    def search(asked: Asked) -> dict[str, Any]:
        """Images of the gallery for a reference and what should differ."""
        if unknown := set(asked.models) - set(service.models):
            raise HTTPException(404, f"{min(unknown)}: no such model; there are {', '.join(service.models)}")
        _check(asked.reference)
        with _answering("the reference is not in the gallery, nor among the last uploads"):
            return service.search(asked)


def _add_explain(app: FastAPI, service: Service) -> None:
    @app.post("/v1/explain")
    def explain(pair: Pair) -> dict[str, Any]:
        """What the generator writes of a reference and a result, and the mean log-probability of its words."""
        _check(pair.reference)
        if service.run.pseudo_triplets is None:
            raise HTTPException(404, "this run has no generator: none of its models was trained on pseudo triplets")
        with _answering("one of the two is not in the gallery, nor among the last uploads", 409):
            return service.explain(pair)


@contextmanager
def _answering(unknown: str, wrong: int = 422) -> Iterator[None]:
    """What is `unknown` is 404, a user's mistake the status `wrong`."""
    try:
        yield
    except KeyError as error:
        raise HTTPException(404, unknown) from error
    except UserError as error:
        raise HTTPException(wrong, str(error)) from error


def _check(reference: From) -> None:
    if (reference.image_id is None) == (reference.upload is None):
        raise HTTPException(422, "reference: give image_id or upload")


async def _body(request: Request) -> bytes:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > UPLOAD_BYTES:
            raise HTTPException(413, f"the image is larger than {UPLOAD_BYTES} bytes")
    return bytes(content)


def _add_images(app: FastAPI, service: Service) -> None:
    @app.get("/v1/gallery")
    def gallery(seed: int = 0) -> dict[str, Any]:
        """Some images to start from, drawn by seed."""
        known = np.fromiter(service.thumbnails, np.int64)
        ids = np.random.default_rng(abs(seed)).permutation(known)[:SAMPLE]
        keys = service.searcher.keys(ids)
        return {"images": [{"image_id": str(i), "key": key} for i, key in zip(ids.tolist(), keys, strict=True)]}

    @app.get("/v1/images/{image_id}/thumbnail")
    def small(image_id: ImageId) -> Response:
        """A JPEG."""
        if image_id not in service.thumbnails:
            raise HTTPException(404, "no such image")
        return Response(service.thumbnails[image_id], media_type="image/jpeg", headers=IMMUTABLE)

    @app.get("/v1/images/{image_id}")
    def large(image_id: ImageId) -> Response:
        """A JPEG of at most `SHOWN_SIDE` pixels a side, whatever the file is."""
        if image_id not in service.thumbnails:
            raise HTTPException(404, "no such image")
        return service.shown(service.searcher.gallery, image_id, SHOWN_SIDE)


def _add_results(app: FastAPI, teaching: Teaching, author: str) -> None:
    @app.get("/v1/labels/results")
    def taught() -> dict[str, Any]:
        """The results that were called right."""
        labels = teaching.store.last(teaching.digest).values()
        fields = [{"reference_id": str(x["reference_id"]), "target_id": str(x["target_id"]), "text": x["text"]} for x in labels]
        return {"results": fields}

    @app.post("/v1/labels/results", status_code=201)
    def teach(found: Found) -> Label:
        """Call a result right, or take it back: a triplet to train on. The same one again gives the same answer."""
        with _answering("one of the two is not in the gallery"):
            return teaching.judge(found, author)


def _add_labels(app: FastAPI, service: Service, labelling: Labelling, author: str) -> None:
    labelling.queue(1)  # what it needs is made before the first request

    @app.get("/v1/queue")
    def queue(n: Annotated[int, Query(ge=1, le=50)] = 10) -> dict[str, Any]:
        """Pairs to judge, with their deltas, and why each was drawn."""
        pairs = []
        for triplet, reason in labelling.queue(n):
            row = labelling.rows[triplet]
            ids = {name: str(row[name]) for name in ("triplet_id", "reference_id", "target_id")}
            pairs.append(ids | {"deltas": row["deltas"][:3], "reason": reason})
        return {"pairs": pairs}

    @app.post("/v1/labels", status_code=201)
    def judge(judged: Judged) -> Label:
        """Keep a label. The same one again gives the same answer."""
        with _answering("no such triplet"):
            return labelling.judge(judged, author)

    @app.get("/v1/labels/summary")
    def summary() -> dict[str, Any]:
        """Counts by verdict, and the generator's precision."""
        measured = labelling.precision()
        counts = Counter(label["verdict"] for label in labelling.labels().values())
        return {"of": len(labelling.rows), "counts": counts, "precision": measured and asdict(measured)}

    @app.get("/v1/pairs/images/{image_id}")
    def image(image_id: ImageId) -> Response:
        """A JPEG of an image of a mined pair."""
        if image_id not in labelling.images:
            raise HTTPException(404, "no such image")
        return service.shown(labelling.gallery, image_id, SHOWN_SIDE // 2)


def _add_page(app: FastAPI) -> None:
    content = {name: (PAGE / name).read_bytes() for name in FILES}

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return Response(content["index.html"], media_type=FILES["index.html"], headers={"cache-control": "no-cache"})

    @app.get("/page/{name}", include_in_schema=False)
    def file(name: str) -> Response:
        if name not in content:
            raise HTTPException(404, "no such file")
        return Response(content[name], media_type=FILES[name], headers={"cache-control": "no-cache"})
