"""What a GPU is kept busy with, as ratios in one run: embedding, ingest, an instruction step, generation, neighbours.

    PYTHONPATH=. python tests/benchmarks/bench_gpu.py [embed] [instruct] [generate] [neighbours]

Weights are random: ViT-L/14 and the shape of LLaMA-7B, in bf16. Without a GPU all shapes are tiny, and the ratios say nothing.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from bench_embed import Clock
from PIL import Image
from timing import interleaved
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from cluster.artifacts import Output
from cluster.config import EmbedResources, TrainingConfig
from cluster.driver import session
from cluster.training import engine
from cluster.weights import Weights
from mining.block_product import BlockProduct
from mining.config import GalleryConfig, IngestConfig, TowerConfig, ViewsConfig
from mining.neighbours import blocks
from mining.search import neighbours_of
from mining.towers import ImageTower
from tests.mining.stages import embed_gallery, ingest_gallery
from vdg.backbones import decoding, features
from vdg.backbones.base import Batch
from vdg.config import GenerateConfig, VdgConfig
from vdg.description import Description
from vdg.language import with_fused_kernels
from vdg.prompts import _PAIR

GPU = torch.cuda.is_available()
DEVICE, PRECISION, DTYPE = ("cuda", "bf16", torch.bfloat16) if GPU else ("cpu", "fp32", torch.float32)
CORES = os.cpu_count() or 1
END = 1  # the token that ends a text
DIM, IMAGE_TOKENS = 768, 32  # of InstructBLIP's queries
DELTA = "make the dog bigger and put it on a green sofa beside the window of the room"


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    tower: TowerConfig
    images: int
    side: int  # the shorter, of the photos
    part: int
    batch: int  # of images
    language_model: dict[str, int]
    steps: int  # of instruction, in a batch of
    triplets: int
    pairs: int
    vectors: tuple[int, int]
    top: int


LARGE = Scale(
    tower=TowerConfig(library="open_clip", model="ViT-L-14", precision="bf16", image_size=224),
    images=32_768,
    side=384,
    part=512,
    batch=256,
    language_model={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    steps=6,
    triplets=32,
    pairs=256,
    vectors=(200_000, 768),
    top=101,
)
SMALL = Scale(
    tower=TowerConfig(library="timm", model="test_vit", precision="fp32", image_size=160),
    images=48,
    side=64,
    part=8,
    batch=8,
    language_model={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    steps=1,
    triplets=2,
    pairs=5,
    vectors=(3000, 16),
    top=11,
)
SCALE = LARGE if GPU else SMALL


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Median seconds of some work on the device, after two rounds that are not counted."""
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        work()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def photo(number: int) -> bytes:
    """A JPEG of noise that is smooth enough to compress as a photo does: 29 KB at 384 pixels."""
    rng, side = np.random.default_rng(number), SCALE.side
    image = Image.fromarray(rng.integers(0, 256, (side // 6, side // 5, 3), np.uint8))
    content = io.BytesIO()
    image.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(content, "JPEG", quality=50)
    return content.getvalue()


def write_photos(folder: Path) -> float:
    """Shards of the photos, a sixteenth of which differ. Returns their mean size in bytes."""
    with ProcessPoolExecutor(CORES) as pool:
        photos = list(pool.map(photo, range(SCALE.images // 16), chunksize=8))
    for first in range(0, SCALE.images, 4096):
        numbers = range(first, min(first + 4096, SCALE.images))
        shard = pa.table({"key": [f"{i:08d}" for i in numbers], "image": [photos[i % len(photos)] for i in numbers]})
        pq.write_table(shard, folder / f"shard-{first:08d}.parquet", row_group_size=512)
    return statistics.mean(map(len, photos))


def embed() -> None:
    """The stage embed in its steady state against its tower alone, and the stage ingest, which feeds it."""
    tasks = max(CORES - 2, 1)
    resources = EmbedResources(actors=1, gpus=float(GPU), decode_tasks=tasks, batch_size=SCALE.batch)
    options = IngestConfig(galleries={}, triplets={}, shard_rows=SCALE.part)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (source := folder / "photos").mkdir()
        size = write_photos(source)
        gallery, ingested, embedded = Output(f"{folder}/gallery"), Clock(), Clock()
        began = time.perf_counter()
        ingest_gallery(gallery, "bench", GalleryConfig(images=str(source)), options, resources, ingested)
        whole = SCALE.images / (time.perf_counter() - began)
        embed_gallery(Output(f"{folder}/embed"), gallery, SCALE.tower, ViewsConfig(count=1), resources, embedded)
    tower = ImageTower(SCALE.tower)
    pixels = torch.randint(0, 256, (SCALE.batch, SCALE.tower.image_size, SCALE.tower.image_size, 3), dtype=torch.uint8)
    pixels = pixels.to(DEVICE)
    bare, rate = SCALE.batch / seconds(lambda: tower(pixels)), embedded.rate()
    print(f"embed: stage {rate:.0f} images/s / bare tower {bare:.0f} images/s = {rate / bare:.3f} (goal >= 0.95)")
    print(
        f"ingest: {whole:.0f} images/s ({ingested.rate():.0f} once it runs) of {size / 1000:.0f} KB on {CORES} cores, "
        f"{whole / bare:.2f} of the bare tower (goal 3000 images/s)",
        flush=True,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One that knows every word of the paper's prompt and of the delta."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([*filter(None, _PAIR["paper"]), DELTA], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def random_language_model(*_: object) -> LlamaForCausalLM:
    """One of the scale's shape, frozen."""
    config = LlamaConfig(vocab_size=32_000, bos_token_id=0, eos_token_id=END, **SCALE.language_model)
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


class Generator:
    """A generator with random weights, and batches for it."""

    def __init__(self) -> None:
        config = VdgConfig(language_model=Weights(folder="random"), prompt="paper")
        self.description = Description(stage="instruct", tokens=IMAGE_TOKENS, dim=DIM, vdg=config)
        with (
            patch.object(features, "load_language_model", random_language_model),
            patch.object(features, "load_tokenizer", lambda _: tokenizer()),
        ):
            self.model = features.FeatureBackbone(self.description, DTYPE).to(DEVICE, DTYPE)
            self.inputs = features.FeatureInputs(self.description, np.zeros(DIM, np.float32), 32)
            self.batch(1, [DELTA])  # it loads its tokenizer

    def batch(self, rows: int, deltas: list[str] | None = None) -> Batch:
        """Of random images."""
        values = np.random.default_rng(0).normal(size=(2, rows, IMAGE_TOKENS, DIM)).astype(np.float32)
        return self.inputs.pairs(values[0], values[1], deltas)


def instruct() -> None:
    """A step of the DeepSpeed engine, one worker, against the loop one would write without us."""
    config = TrainingConfig(steps=1000, batch_size=SCALE.triplets, learning_rate=2e-4, precision=PRECISION)
    with engine.process_group():
        ours, plain = Generator(), Generator().model.train()
        batch = ours.batch(SCALE.triplets, [DELTA] * SCALE.triplets)
        trained = engine.build_engine(ours.model, config, 1)
        trained.train()
        parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.05)

        def step() -> None:
            loss = plain({name: value.to(DEVICE) for name, value in batch.items()})["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())

        our_time, plain_time = interleaved(lambda: engine.forward_backward(trained, batch), step, SCALE.steps)
    print(
        f"instruct: step {our_time * 1000:.0f} ms / plain PyTorch {plain_time * 1000:.0f} ms at batch {SCALE.triplets}, "
        f"{batch['ids'].shape[1]} tokens a row = {our_time / plain_time:.3f} (goal <= 1.05)",
        flush=True,
    )


class Ends(LogitsProcessor):
    """Bare `generate` ends its rows after so many tokens."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Only the end where it is due; nowhere before."""
        due = self.lengths <= input_ids.shape[1] + 1
        scores[:, END] = torch.where(due, torch.inf, -torch.inf)
        return scores


def ending(lengths: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Our decoder's choice of tokens, its rows ending after so many."""
    choose, places = decoding.choose, itertools.count(1)

    def chosen(logits: torch.Tensor, config: GenerateConfig, rows: torch.Tensor, *more: Any) -> torch.Tensor:
        due = lengths[rows.clamp(max=len(lengths) - 1)] <= next(places)
        return torch.where(due, END, choose(logits, config, rows, *more).clamp(min=END + 1))

    return chosen


@torch.no_grad()
def generate() -> None:
    """Greedy deltas of at most 32 tokens against bare `generate` on embeddings that are there."""
    generator, config = Generator(), GenerateConfig(greedy=True, max_new_tokens=32)
    model = generator.model.eval()
    model.merge()
    batch = generator.batch(SCALE.pairs)
    inputs = model.model_inputs({name: value.to(DEVICE) for name, value in batch.items()})
    settings = GenerationConfig(max_new_tokens=config.max_new_tokens, do_sample=False, eos_token_id=END, pad_token_id=END)
    mask = torch.ones_like(batch["ids"], device=DEVICE)
    rng, full = np.random.default_rng(0), np.full(SCALE.pairs, 1000)
    cases = {"no row ends": full, "rows end after 15 tokens in the mean": rng.poisson(14, SCALE.pairs) + 1}
    lengths = {name: torch.from_numpy(values).to(DEVICE) for name, values in cases.items()}
    bare = {}
    for name, ends in lengths.items():
        processors = LogitsProcessorList([Ends(ends)])
        bare[name] = seconds(
            lambda processors=processors: model.language_model.generate(
                **inputs, attention_mask=mask, generation_config=settings, logits_processor=processors
            ).tolist(),
            rounds=2,
        )
    with_fused_kernels(model.language_model)
    for name, ends in lengths.items():

        def ours(ends: torch.Tensor = ends) -> object:
            with patch.object(decoding, "choose", ending(ends)):
                return model.generate(batch, config, 0)

        began = time.perf_counter()
        ours()
        first, rest = time.perf_counter() - began, seconds(ours, rounds=2)
        print(
            f"generate: {SCALE.pairs / rest:.0f} deltas/s (first batch {first:.1f} s) / bare generate "
            f"{SCALE.pairs / bare[name]:.0f} deltas/s at batch {SCALE.pairs}, {mask.shape[1]} tokens before, {name} = "
            f"{bare[name] / rest:.2f} (goal >= 2)",
            flush=True,
        )


def neighbours() -> None:
    """The nearest of every vector, as the stage's actors on a GPU find them, and whether they are those of fp32."""
    rows, dim = SCALE.vectors
    values = np.random.default_rng(0).standard_normal((rows, dim), np.float32)
    vectors = values / np.linalg.norm(values, axis=1, keepdims=True)
    search = BlockProduct(vectors, DEVICE)
    neighbours_of(search, np.arange(256), SCALE.top)
    began = time.perf_counter()
    found = np.concatenate([neighbours_of(search, np.arange(*block), SCALE.top)[0] for block in blocks(rows)])
    rate = rows / (time.perf_counter() - began)
    queries = np.arange(0, rows, max(rows // 1024, 1))
    moved: Any = torch.from_numpy(vectors).to(DEVICE)
    scores = moved[queries] @ moved.T
    scores[torch.arange(len(queries)), torch.from_numpy(queries)] = -torch.inf
    exact = scores.topk(SCALE.top).indices.cpu().numpy()
    same = (np.sort(exact, 1) == np.sort(found[queries], 1)).mean()
    print(
        f"neighbours: {rate:.0f} queries/s of {rows} x {dim}, top {SCALE.top}, rescoring included (goal >= 100000); "
        f"{same:.6f} of them those of fp32",
        flush=True,
    )


SECTIONS: dict[str, Callable[[], None]] = {"embed": embed, "instruct": instruct, "generate": generate, "neighbours": neighbours}


def main() -> None:
    """Print the figures that the arguments ask for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    print(
        f"{torch.cuda.get_device_name() if GPU else 'no GPU: tiny shapes'}, {CORES} cores, torch {torch.__version__}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        session.start(session.RayConfig(num_cpus=CORES), Path(folder) / "log.txt")
        for name in parser.parse_args().sections:
            SECTIONS[name]()
            if GPU:
                torch.cuda.empty_cache()
        ray.shutdown()


if __name__ == "__main__":
    main()
