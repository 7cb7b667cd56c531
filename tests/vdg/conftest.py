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
        defaults = {"lora_rank": 4, "lora_dropout": 0.0, "tokens_per_feature": 3, "prompt": "short", "center": True}
        return VdgConfig(language_model=language_model, **{**defaults, **fields})

    return make


@pytest.fixture
def embeddings(tmp_path: Path) -> Output:
    """Two views of twelve images with ids 0 to 11."""
    output, rng = Output(str(tmp_path / "embeddings")), np.random.default_rng(0)
    values = rng.normal(size=(2, IMAGES, TOKENS, DIM)).astype(np.float16)
    schema = tables.embeddings(TOKENS, DIM)
    for view in range(2):
        rows = {
            "image_id": range(IMAGES),
            "view": [view] * IMAGES,
            "tokens": [TOKENS] * IMAGES,
            "values": list(values[view].reshape(IMAGES, -1)),
        }
        output.write_table(f"part-00000.v{view}.parquet", pa.table(rows, schema), schema)
    output.write_json("info.json", {"tokens": TOKENS, "dim": DIM, "views": 2})
    output.write_bytes("mean.safetensors", save({"mean": values[0].astype(np.float32).mean((0, 1))}))
    return output


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
