"""Every neighbour of a gallery of clustered vectors through mining's inverted lists on disk: time, recall and memory.

python tests/benchmarks/bench_neighbours.py --rows 2000000
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from memory import peaks

from mining.config import IndexConfig
from mining.indexes import filled
from mining.neighbours import blocks
from mining.search import Exact, Lists, Search, neighbours_of, plan

DIM, ROWS_A_CLUSTER, NOISE, TOP = 256, 50, 0.6, 20
WRITTEN_ROWS = 50_000  # vectors in memory at a time


def write_vectors(path: Path, rows: int) -> np.ndarray:
    """Memory-mapped unit vectors float32 [rows, DIM] in clusters, as the photos of a gallery are."""
    rng = np.random.default_rng(0)
    clusters = max(rows // ROWS_A_CLUSTER, 1)
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, DIM))
    for first in range(0, rows, WRITTEN_ROWS):
        here = slice(first, min(first + WRITTEN_ROWS, rows))
        owners, owner = np.unique(rng.integers(clusters, size=here.stop - first), return_inverse=True)
        # a cluster's centre follows from its number: all centres are never held
        centres = np.stack([np.random.default_rng([1, number]).standard_normal(DIM, np.float32) for number in owners])
        values = NOISE * rng.standard_normal((len(owner), DIM), np.float32) + centres[owner]
        vectors[here] = values / np.linalg.norm(values, axis=1, keepdims=True)
    vectors.flush()
    return np.load(path, mmap_mode="r")


def opened(vectors: np.ndarray, index: str) -> tuple[dict[str, Any], Search]:
    """As the actors of the stage open it."""
    if index == "exact":
        return {"index": index}, Exact(vectors)
    report, lists = plan(vectors, TOP, IndexConfig.model_validate({"kind": index}), seed=0)
    lists = filled(lists, vectors, index == "ondisk")
    lists.nprobe = report["nprobe"]
    return report, Lists(vectors, lists)


def main() -> None:
    """Print what building and searching take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--index", choices=("exact", "ivf", "ondisk"), default="ondisk")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        vectors = write_vectors(Path(folder) / "vectors.npy", arguments.rows)
        began = time.perf_counter()
        with peaks() as private:
            report, search = opened(vectors, arguments.index)
            built = time.perf_counter() - began
            searched = sum(len(neighbours_of(search, np.arange(*block), TOP)[0]) for block in blocks(arguments.rows))
        seconds = time.perf_counter() - began - built
        on_disk = sum(path.stat().st_size for path in Path(folder).glob("*/*.lists/*"))
        tempfile.tempdir = None
    print(f"neighbours: {report}")
    print(
        f"neighbours of {searched:,} vectors: built in {built:.0f} s, searched in {seconds:.0f} s, peak private memory "
        f"{private['driver'] / 2**20:.0f} MiB ({private['driver'] / searched:.0f} bytes an image), "
        f"index on disk {on_disk / searched:.0f} bytes an image"
    )


if __name__ == "__main__":
    main()
