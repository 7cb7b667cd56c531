"""The embed stage, once it works, against a bare loop of the same decode and tower in as many processes."""

import math
import multiprocessing
import os
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow.parquet as pq

from cluster.app.config import load
from cluster.artifacts import Output
from cluster.config import DecodeResources, EmbedResources
from cluster.devices import limit_threads
from cluster.driver import session
from cluster.monitor import Monitor
from mining.config import GalleryConfig, IngestConfig, TowerConfig, ViewsConfig
from mining.images import render
from tests.mining.stages import embed_gallery, ingest_gallery

PHOTOS = Path(__file__).parents[1] / "data" / "grocery" / "train"
PROCESSES, SHARD, VIEWS = 2, 128, 2
RESOURCES, DECODE = EmbedResources(actors=PROCESSES, cpus=1, decode_tasks=0), DecodeResources(decode_tasks=PROCESSES)


class Clock(Monitor):
    """When work on the first part began and the last was finished, and the images."""

    def __init__(self) -> None:
        self.began, self.ended, self.images = math.inf, 0.0, 0

    def advance(self, count: int, seconds: float = 0.0) -> None:
        """A part of `count` images is finished."""
        self.ended = time.perf_counter()
        self.began = min(self.began, self.ended - seconds)
        self.images += count

    def rate(self) -> float:
        """Images a second. Most are decoded in that time, as tasks run ahead of the actors only from their start."""
        return self.images / (self.ended - self.began)


def stage_rate(tower: TowerConfig, folder: str) -> float:
    """Images a second of the stage."""
    session.start(session.RayConfig(num_cpus=2), Path(folder) / "log.txt")
    gallery, clock = Output(f"{folder}/gallery"), Clock()
    options = IngestConfig(galleries={}, triplets={}, shard_rows=SHARD)
    ingest_gallery(gallery, "bench", GalleryConfig(images=str(PHOTOS)), options, DECODE, Monitor())
    embed_gallery(Output(f"{folder}/embed"), gallery, tower, ViewsConfig(count=VIEWS), RESOURCES, clock)
    return clock.rate()


def bare_loop(tower: TowerConfig, images: list[bytes], ready: Barrier, seconds: "multiprocessing.Queue[float]") -> None:
    """Decode and embed batch after batch in one process."""
    import numpy as np
    import torch

    from mining.towers import ImageTower

    limit_threads(RESOURCES.cpus)
    model = ImageTower(tower)
    ready.wait()
    began = time.perf_counter()
    for start in range(0, len(images), 64):
        pixels = [render(content, tower, ViewsConfig(), (0, 0)) for content in images[start : start + 64]]
        model(torch.from_numpy(np.stack(pixels)))
    seconds.put(time.perf_counter() - began)


def bare_rate(tower: TowerConfig, images: list[bytes]) -> float:
    """Images a second of bare processes."""
    os.environ.update(session.WORKER_ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(PROCESSES), context.Queue()
    shares = [images[rank::PROCESSES] for rank in range(PROCESSES)]
    workers = [context.Process(target=bare_loop, args=(tower, share, ready, seconds)) for share in shares]
    for worker in workers:
        worker.start()
    slowest = max(seconds.get() for _ in workers)
    for worker in workers:
        worker.join()
    return len(images) / slowest


def main() -> None:
    """Print the ratio of the two rates."""
    tower = load("grocery", []).embed.towers["photo"]
    images = pq.read_table(PHOTOS, columns=["image"])["image"].to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        before = bare_rate(tower, images[:1024])
        ours = stage_rate(tower, folder)
        bare = (before + bare_rate(tower, images[:1024])) / 2
    print(f"embed: stage {ours:.1f} images/s / bare loop {bare:.1f} images/s = {ours / bare:.2f} (goal >= 0.95)")


if __name__ == "__main__":
    main()
