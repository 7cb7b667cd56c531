"""The Arrow schema of every table that passes between stages, and the ids of their rows."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from cluster.artifacts import Output
from cluster.errors import UserError

GALLERY = pa.schema(
    [
        ("image_id", pa.int64()),
        ("key", pa.string()),  # name in its source
        ("image", pa.binary()),  # encoded bytes; null when indexed in place
        ("uri", pa.string()),  # file that holds the bytes when indexed in place
        ("offset", pa.int64()),  # byte offset in `uri`; for a Parquet file the row
        ("length", pa.int64()),  # bytes
        ("sha256", pa.string()),  # of the encoded bytes
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
MINEABLE = pa.schema([("image_id", pa.int64())])  # images that no benchmark excludes
NEIGHBOURS = pa.schema(
    [
        ("image_id", pa.int64()),
        ("neighbour_ids", pa.list_(pa.int64())),  # the nearest images, most similar first, the image itself left out
        ("cosines", pa.list_(pa.float32())),
    ]
)
PAIRS = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("group_id", pa.int64()),  # null for matched pairs, as are the ranks
        ("reference_id", pa.int64()),
        ("target_id", pa.int64()),
        ("reference_rank", pa.int16()),
        ("target_rank", pa.int16()),
        ("similarity", pa.float32()),  # cosine
    ]
)
TRIPLETS = pa.schema(
    [
        ("triplet_id", pa.int64()),
        ("pair_id", pa.int64()),  # null for human triplets
        ("group_id", pa.int64()),  # null where images are not grouped
        ("reference_id", pa.int64()),
        ("target_id", pa.int64()),
        ("deltas", pa.list_(pa.string())),  # one is drawn each time
        ("source", pa.string()),  # "human" or "vdg"
    ]
)
GROUPS = pa.schema([("group_id", pa.int64()), ("image_ids", pa.list_(pa.int64()))])  # every image of a group
SCORER = "log_probability"  # mean log-probability of a delta's tokens, in nats
AGREEMENT = "agreement"  # mean word F1 of a delta with the other deltas sampled for its pair, 0 to 1
LIKELIHOOD = "likelihood"  # log-probability of a whole text given (reference, target) by a generator, in nats
ROUND_TRIP = "round_trip"  # -ln of the target's rank for (reference, delta) by a retrieval model
SCORES = pa.schema([("triplet_id", pa.int64()), ("scorer", pa.string()), ("value", pa.float32())])
CAPTIONS = pa.schema([("image_id", pa.int64()), ("caption", pa.string())])
# images of a benchmark that must not be mined: a name (or the start of names), a hash of encoded bytes, or both
EXCLUDED = pa.schema([("name", pa.string()), ("is_prefix", pa.bool_()), ("sha256", pa.string())])


def embeddings(tokens: int, dim: int) -> pa.Schema:
    """Schema of cached tower outputs: `tokens` vectors of width `dim` for each image and augmented view (0 is plain)."""
    values = pa.list_(pa.float16(), tokens * dim)
    return pa.schema([("image_id", pa.int64()), ("view", pa.int16()), ("tokens", pa.int16()), ("values", values)])


def stable_id(*parts: object) -> int:
    """A non-negative int64 that depends on `parts` alone: the same on every machine and in every run."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_unique(ids: Iterable[int], what: str) -> None:
    """Raises UserError when two rows have one id: a hash collision (about 1 in 10^7 for a million rows)."""
    array = np.fromiter(ids, np.int64)
    if len(np.unique(array)) != len(array):
        raise UserError(f"{what}: two rows have the same id; rename one of them")


def images_of(table: pa.Table) -> np.ndarray:
    """Sorted ids of the images that triplets name."""
    return np.unique(np.concatenate([table["reference_id"].to_numpy(), table["target_id"].to_numpy()]))


def images_in(output: Output, schema: pa.Schema) -> np.ndarray:
    """As `images_of`, of all rows of an output: TRIPLETS or PAIRS."""
    return images_of(output.read_parts(schema, ["reference_id", "target_id"]))
