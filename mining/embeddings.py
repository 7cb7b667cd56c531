"""Reading the embeddings that embed wrote: one part a (gallery part, view)."""

from functools import lru_cache

import numpy as np
import pyarrow.compute as pc

from cluster.artifacts import Output
from mining import tables

INFO = "info.json"
MEAN = "mean.safetensors"


def view_part(part: str, view: int) -> str:
    """The part that holds one view of a gallery's part."""
    return part.replace(".parquet", f".v{view}.parquet")


def gallery_part(part: str) -> str:
    """The part of the gallery that a part of the embeddings was made of."""
    return part.rsplit(".v", 1)[0] + ".parquet"


def view_of(part: str) -> int:
    """The view that a part of the embeddings holds."""
    return int(part.removesuffix(".parquet").rsplit(".v", 1)[1])


def read_part(output: Output, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(image ids [n], values float16 [n, tokens, dim]) of one part of the embeddings."""
    tokens, dim = _info(output)
    table = output.read_table(name, tables.embeddings(tokens, dim), ["image_id", "values"])
    values = pc.list_flatten(table["values"]).to_numpy()
    return table["image_id"].to_numpy(), values.reshape(-1, tokens, dim)


def read_ids(output: Output, name: str) -> np.ndarray:
    """Image ids int64 [n] of one part of the embeddings."""
    return output.read_table(name, tables.embeddings(*_info(output)), ["image_id"])["image_id"].to_numpy()


@lru_cache(maxsize=64)
def _info(output: Output) -> tuple[int, int]:
    if not output.exists(INFO):
        raise FileNotFoundError(f"{output.uri} has no {INFO}: the embeddings are not finished")
    info = output.read_json(INFO)
    return info["tokens"], info["dim"]


def plain_parts(output: Output) -> list[str]:
    """Names of the parts of the plain view."""
    return [name for name in output.parts() if view_of(name) == 0]
