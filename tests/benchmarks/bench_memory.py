"""Peak private memory of driver and workers by stage, at several sizes of a gallery (`large_gallery.py`).

    PYTHONPATH=. python tests/benchmarks/bench_memory.py --images 10000 100000

Goal: the largest at most 1.1 times the smallest for ingest, embed, generate and for training on pixels of the whole gallery;
mine and training grow by some bytes an image or triplet. Each size runs in a process and a Ray of its own, with a random
tower and random models, all tiny. Galleries are kept in `--folder`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from large_gallery import make
from memory import peaks
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from cluster.artifacts import Output
from cluster.config import ActorResources, EmbedResources, TaskResources, TrainingConfig, WorkerResources
from cluster.driver import session
from cluster.monitor import Monitor
from cluster.training.checkpoints import WEIGHTS
from mining import tables
from mining.config import GalleryConfig, IngestConfig, MineConfig, TowerConfig, ViewsConfig, WalkConfig
from mining.features import Online, copy_mean
from tests.cir import world
from tests.cir.stages import train_cir
from tests.mining.stages import embed_gallery, ingest_gallery, mine_pairs
from tests.stages import centred_by_own
from tests.tiny import WORDS, image_text_model, text_tower
from tests.vdg.stages import generate, instruct
from vdg.backbones import build
from vdg.config import GenerateConfig, InstructConfig, VdgConfig
from vdg.description import DESCRIPTION, describe
from vdg.images import Images

PAIRS, PART_PAIRS = 256, 64
T = TypeVar("T")
STAGES = ("ingest", "embed", "mine", "generate", "instruct", "train")
TRAINING = TrainingConfig(steps=8, batch_size=16, learning_rate=1e-3)


def measure(images: int, folder: Path) -> dict[str, dict[str, float]]:
    """Peak bytes by kind of process, and seconds, of each stage on one gallery."""
    make(source := folder / f"source-{images}", images)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as work:
        session.start(session.RayConfig(num_cpus=2), Path(work) / "log.txt")
        for name, stage in _stages(source, Path(work)):
            began = time.perf_counter()
            with peaks() as found[name]:
                stage()
            found[name]["seconds"] = time.perf_counter() - began
    return found


def _stages(source: Path, work: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each stage when the one before has run."""
    resources = EmbedResources(actors=1, cpus=1, decode_cpus=0.5, decode_tasks=2)
    gallery, embeddings, mined, sample = (Output(str(work / name)) for name in ("gallery", "embeddings", "mined", "sample"))
    options = IngestConfig(galleries={}, triplets={}, shard_rows=512)
    tower = TowerConfig(library="timm", model="test_efficientnet", image_size=64, precision="fp32")
    mine = MineConfig(gallery="large", tower="tiny", walk=WalkConfig(max_slots=2, max_similarity=1.0, spacing=0.0))

    ingest = GalleryConfig(images=str(source)), options, resources, Monitor()
    yield "ingest", lambda: ingest_gallery(gallery, "large", *ingest)
    yield "embed", lambda: embed_gallery(embeddings, gallery, tower, ViewsConfig(), resources)
    yield "mine", lambda: mine_pairs(mined, embeddings, None, None, mine, 0, TaskResources(), Monitor())
    _sample(mined, sample)
    pseudo, model = Output(str(work / "pseudo")), _generator(embeddings, work)
    how = GenerateConfig(max_new_tokens=8, batch_size=32), 0, ActorResources(), Monitor()
    yield "generate", lambda: generate(pseudo, centred_by_own(embeddings), sample, model, *how)
    labelled, seen = _labelled(mined, Output(str(work / "labelled"))), Images((gallery,))
    vdg = VdgConfig(backbone="image_text", language_model=_made(image_text_model, "llava", work / "llava"), lora_rank=4)
    fit = 0, WorkerResources(), Monitor()
    instructed = Output(str(work / "instructed"))
    yield "instruct", lambda: instruct(instructed, seen, labelled, None, vdg, InstructConfig(training=TRAINING), *fit)
    views = ViewsConfig(online=True)
    variant = world.variant(_made(text_tower, work / "text"), training=TRAINING.model_dump())
    online, trained = centred_by_own(embeddings, Online((gallery,), tower, views)), Output(str(work / "trained"))
    yield "train", lambda: train_cir(trained, online, labelled, None, variant, *fit)


def _sample(mined: Output, sample: Output) -> None:
    """As many of the mined pairs at every size, drawn over the whole gallery: their images lie in all parts."""
    table = mined.read_parts(tables.PAIRS)
    table = table.take(np.random.default_rng(0).permutation(len(table))[:PAIRS])
    for part, first in enumerate(range(0, len(table), PART_PAIRS)):
        sample.write_table(f"part-{part:05d}.parquet", table.slice(first, PART_PAIRS), tables.PAIRS)


def _labelled(mined: Output, labelled: Output) -> Output:
    """A triplet of every mined pair: their images are nearly all of the gallery."""
    for name in mined.parts():
        pairs = mined.read_table(name, tables.PAIRS)
        columns = {"triplet_id": pairs["pair_id"], "reference_id": pairs["reference_id"], "target_id": pairs["target_id"]}
        constant = {"deltas": [[WORDS[0]]] * len(pairs), "source": ["human"] * len(pairs)}
        nulls = {name: [None] * len(pairs) for name in ("pair_id", "group_id")}
        triplets = pa.Table.from_pydict({**columns, **constant, **nulls}, schema=tables.TRIPLETS)
        labelled.write_table(name, triplets, tables.TRIPLETS)
    return labelled


def _made(make: Callable[..., T], *arguments: Any) -> T:
    """A tiny model in a folder that is the last argument."""
    arguments[-1].mkdir()
    return make(*arguments)


def _generator(embeddings: Output, work: Path) -> Output:
    """An untrained generator as `instruct` leaves it."""
    from tests.tiny import language_model

    weights, output = language_model(work / "language_model"), Output(str(work / "model"))
    vdg = VdgConfig(language_model=weights, tokens_per_feature=2, prompt="short", lora_rank=4)
    description = describe("instruct", centred_by_own(embeddings), vdg)
    output.write_json(DESCRIPTION, description.model_dump(mode="json"))
    copy_mean(centred_by_own(embeddings), output)
    trained = {name: p.detach() for name, p in build(description).named_parameters() if p.requires_grad}
    output.write_bytes(WEIGHTS, save(trained))
    return output


def show(found: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print the table, and mining's bytes an image."""
    sizes = sorted(found)
    table = Table("stage", "process", *(f"{size:,} images" for size in sizes), "ratio", title="peak private memory, MiB")
    for stage in STAGES:
        for kind in sorted(set.intersection(*(set(found[size][stage]) for size in sizes)) - {"seconds"}):
            values = [found[size][stage][kind] / 2**20 for size in sizes]
            table.add_row(stage, kind, *(f"{value:.0f}" for value in values), f"{values[-1] / values[0]:.2f}")
        table.add_row(stage, "seconds", *(f"{found[size][stage]['seconds']:.0f}" for size in sizes), "", end_section=True)
    Console(width=100).print(table)
    if len(sizes) > 1:
        grown = found[sizes[-1]]["mine"]["task"] - found[sizes[0]]["mine"]["task"]
        print(f"mine: {grown / (sizes[-1] - sizes[0]):.0f} bytes of memory an image")


def main() -> None:
    """Measure each size in a process of its own, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 2000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vdg-bench-memory")
    parser.add_argument("--one", action="store_true", help="measure one size here and print it as JSON")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        print(json.dumps(measure(arguments.images[0], arguments.folder)))
        return
    found = {}
    for size in arguments.images:
        command = [sys.executable, __file__, "--one", "--images", str(size), "--folder", str(arguments.folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[size] = json.loads(done.stdout.splitlines()[-1])
    show(found)


if __name__ == "__main__":
    main()
