"""Tiny embeddings, captions, triplets and pairs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save

from cluster.artifacts import Output
from cluster.weights import Weights
from mining import tables
from tests.tiny import WORDS
from vdg.config import VdgConfig

IMAGES, TOKENS, DIM = 12, 2, 8


@pytest.fixture(scope="session")
def vdg(language_model: Weights) -> Callable[..., VdgConfig]:
    """Makes a config of the tiny generator."""

    def make(**fields: Any) -> VdgConfig:
        defaults = {"language_model": language_model, "tokens_per_feature": 3, "prompt": "short", "center": True}
        return VdgConfig(**{**defaults, "lora_rank": 4, "lora_dropout": 0.0, **fields})

    return make


@pytest.fixture
def gallery(tmp_path: Path, photos: list[tuple[str, bytes]]) -> Output:
    """Twelve real photos with ids 0 to 11."""
    output = Output(str(tmp_path / "gallery"))
    rows = [{"image_id": i, "key": key, "image": content} for i, (key, content) in enumerate(photos[:IMAGES])]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    return output


def write_embeddings(output: Output, values: np.ndarray) -> Output:
    """Embeddings, as `embed` writes them, of values [views, images, tokens, dim]."""
    views, images, tokens, dim = values.shape
    schema = tables.embeddings(tokens, dim)
    for view in range(views):
        rows = {
            "image_id": range(images),
            "view": [view] * images,
            "tokens": [tokens] * images,
            "values": list(values[view].astype(np.float16).reshape(images, -1)),
        }
        output.write_table(f"part-00000.v{view}.parquet", pa.table(rows, schema), schema)
    output.write_json("info.json", {"tokens": tokens, "dim": dim, "views": views})
    output.write_bytes("mean.safetensors", save({"mean": values[0].astype(np.float32).mean((0, 1))}))
    return output


@pytest.fixture
def embeddings(tmp_path: Path) -> Output:
    """Two views of twelve images with ids 0 to 11."""
    values = np.random.default_rng(0).normal(size=(2, IMAGES, TOKENS, DIM)).astype(np.float16)
    return write_embeddings(Output(str(tmp_path / "embeddings")), values)


@pytest.fixture
def captions(tmp_path: Path) -> Output:
    """One caption an image."""
    output = Output(str(tmp_path / "captions"))
    rows = {"image_id": range(IMAGES), "caption": [WORDS[i % len(WORDS)] for i in range(IMAGES)]}
    output.write_table("part-00000.parquet", pa.table(rows, tables.CAPTIONS), tables.CAPTIONS)
    return output


@pytest.fixture
def triplets(tmp_path: Path) -> Output:
    """24 triplets of one or two deltas."""
    output = Output(str(tmp_path / "triplets"))
    rows = [
        {
            "triplet_id": tables.stable_id("triplet", i),
            "reference_id": i % IMAGES,
            "target_id": (i * 5 + 3) % IMAGES,
            "deltas": [WORDS[i % 6]] if i % 2 else [WORDS[i % 6], f"now {WORDS[i % 6]}"],
            "source": "human",
        }
        for i in range(24)
    ]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    return output


@pytest.fixture
def pairs(tmp_path: Path) -> Output:
    """Two parts of seven pairs."""
    output = Output(str(tmp_path / "pairs"))
    for part in range(2):
        rows = [
            {
                "pair_id": 100 * part + i,
                "group_id": part,
                "reference_id": i,
                "target_id": (i + 1 + part) % IMAGES,
                "reference_rank": 0,
                "target_rank": 1,
                "similarity": 0.5,
            }
            for i in range(7)
        ]
        output.write_table(f"part-0000{part}.parquet", pa.Table.from_pylist(rows, tables.PAIRS), tables.PAIRS)
    return output
