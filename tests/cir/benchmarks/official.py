"""The official annotation files, where they are there, and vectors for their queries and images."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cir.benchmarks.benchmark import Benchmark, Protocol
from cir.config import EvaluateConfig
from cir.evaluate import RANKINGS
from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.monitor import Monitor
from tests.cir.stages import evaluate_given

COCO_IMAGES = 123_403


def annotations(name: str) -> str:
    """A benchmark's folder, of $VDG_SHARED or of a folder `shared/data` beside the project or above; else the test skips."""
    above = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    places = [Path(given)] if (given := os.environ.get("VDG_SHARED")) else above
    found = next((place / name for place in places if (place / name).is_dir()), None)
    if found is None:
        pytest.skip(f"needs the official annotations of {name}: no shared/data/{name} here or above, and VDG_SHARED names none")
    return str(found)


def circo_folder(folder: Path) -> str:
    """CIRCO's annotations with a list of COCO's images made up around those that they name."""
    source = Path(annotations("circo"))
    shutil.copytree(source / "annotations", folder / "annotations")
    rows = [row for part in ("val", "test") for row in json.loads((source / "annotations" / f"{part}.json").read_text())]
    ids = {i for row in rows for i in (row["reference_img_id"], *row.get("gt_img_ids", []))}
    filler = (i for i in range(10**6, 2 * 10**6))
    images = [{"id": i} for i in [*sorted(ids), *(next(filler) for _ in range(COCO_IMAGES - len(ids)))]]
    path = folder / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"images": images}))
    return str(folder)


def random_vectors(benchmark: Benchmark, dim: int = 32, seed: int = 0) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Query vectors [queries, dim], and a vector of each image by id."""
    rng = np.random.default_rng(seed)
    gallery = rng.normal(size=(len(benchmark.names), dim)).astype(np.float32)
    return rng.normal(size=(len(benchmark.queries), dim)).astype(np.float32), dict(zip(benchmark.names, gallery, strict=True))


def write_vectors(path: Path, benchmark: Benchmark, queries: np.ndarray, gallery: dict[int, np.ndarray]) -> str:
    """The file that `evaluate.embeddings` takes."""
    keys = [query.key for query in benchmark.queries] + [benchmark.names[i] for i in gallery]
    kinds = ["query"] * len(queries) + ["gallery"] * len(gallery)
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.concatenate([queries, np.stack(list(gallery.values()))]).reshape(-1)), queries.shape[1]
    )
    pq.write_table(pa.table({"kind": kinds, "key": keys, "vector": vectors}), path)
    return str(path)


Compose = Callable[[Benchmark, np.ndarray, dict[int, np.ndarray]], np.ndarray]


def of_targets(benchmark: Benchmark, queries: np.ndarray, gallery: dict[int, np.ndarray]) -> np.ndarray:
    """Queries that are their target's own vector: every target ranks first."""
    return np.stack([gallery[query.targets[0]] for query in benchmark.queries])


def of_references(benchmark: Benchmark, queries: np.ndarray, gallery: dict[int, np.ndarray]) -> np.ndarray:
    """Queries that copy the reference."""
    return np.stack([gallery[query.reference] for query in benchmark.queries])


def score(folder: Path, benchmark: Benchmark, compose: Compose | None = None) -> Output:
    """The evaluate stage on random image vectors, and on queries that are random too or made from them."""
    queries, gallery = random_vectors(benchmark)
    folder.mkdir(exist_ok=True)
    file = write_vectors(
        folder / "vectors.parquet", benchmark, compose(benchmark, queries, gallery) if compose else queries, gallery
    )
    output = Output(str(folder / "evaluation"))
    evaluate_given(output, benchmark, file, EvaluateConfig(), ActorResources(actors=2), Monitor())
    return output


def means(output: Output) -> dict[str, float]:
    """Metric -> percent, of the given embeddings."""
    return {name: value["mean"] for name, value in output.read_json("metrics.json")["embeddings"].items()}


def ranking(benchmark: Benchmark, protocol: Protocol, image_ids: np.ndarray) -> pa.Table:
    """A ranking by hand: ids [queries, top], best first."""
    targets = np.array([query.targets[0] for query in benchmark.queries])
    at = image_ids == targets[:, None]
    columns = {
        "triplet_id": [query.query_id for query in benchmark.queries],
        "image_ids": list(image_ids),
        "scores": list(np.zeros(image_ids.shape, np.float32)),
        "correct": list(benchmark.correct(image_ids)),
        "target_rank": pa.array((at.argmax(axis=1) + 1).astype(np.float32), mask=~at.any(axis=1)),
        "subset_rank": pa.nulls(len(targets), pa.float32()),
        "reference_first": np.zeros(len(targets), bool),
    }
    return pa.table(columns, schema=RANKINGS)


def within_error(percent: float, probability: float, trials: int) -> bool:
    """Whether a share of successes is within 4.5 standard errors of its binomial expectation."""
    return abs(percent / 100 - probability) <= 4.5 * np.sqrt(probability * (1 - probability) / trials)
