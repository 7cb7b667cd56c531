"""The paper's walk, from vectors to its pairs, against the bare FAISS search it needs."""

import faiss
import numpy as np
from timing import interleaved

from mining.config import WalkConfig
from mining.features import centred
from mining.neighbours import Nearest, blocks
from mining.pairs.walk import groups_of, pairs_of, shuffled, without_overlap
from mining.search import Exact, neighbours_of

ROWS, DIM, CLUSTERS, ROUNDS = 20_000, 512, 800, 3
CONFIG = WalkConfig()


def vectors() -> np.ndarray:
    """Unit vectors in clusters, as the photos of a gallery are."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(CLUSTERS, DIM))[rng.integers(CLUSTERS, size=ROWS)] + 0.6 * rng.normal(size=(ROWS, DIM))
    return centred(values.astype(np.float32), np.zeros(1, np.float32))


def walk(values: np.ndarray) -> None:
    """The walk, to its pairs."""
    search = Exact(values)
    found = (neighbours_of(search, np.arange(*block), CONFIG.top) for block in blocks(ROWS))
    nearest = Nearest(np.arange(ROWS), *(np.concatenate(part) for part in zip(*found, strict=True)))
    groups = np.concatenate([groups_of(nearest, block, CONFIG) for block in nearest.blocks()])
    pairs_of(without_overlap(shuffled(groups, ROWS, 0), ROWS, CONFIG), ROWS)


def search(values: np.ndarray) -> None:
    """Exact search of every vector's neighbours, as many as the walk looks at."""
    index = faiss.IndexFlatIP(DIM)
    index.add(values)
    for start in range(0, ROWS, 4096):
        index.search(values[start : start + 4096], CONFIG.top + 1)


def main() -> None:
    """Print the ratio of the two times."""
    values = vectors()
    ours, bare = interleaved(lambda: walk(values), lambda: search(values), ROUNDS)
    print(f"mine: walk of {ROWS:,} images {ours:.2f} s / bare search {bare:.2f} s = {ours / bare:.2f} (goal <= 1.3)")


if __name__ == "__main__":
    main()
