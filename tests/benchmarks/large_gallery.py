"""A large gallery from the photos of `tests/data/grocery`: each image a crop, size and encoding of its own, as Parquet shards.

    python tests/benchmarks/large_gallery.py FOLDER --images 100000

Images are 64 to 96 pixels a side, about 4 KB each. The same number of images gives the same files.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PHOTOS = Path(__file__).parents[1] / "data" / "grocery" / "train"
SHARD_IMAGES = 4096
SIDES = (64, 96)
ENCODINGS = ("JPEG", "JPEG", "JPEG", "WEBP", "PNG")


def make(folder: Path, images: int) -> None:
    """Write shards of `key` and `image` into `folder`, which a gallery's `images` can name."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = pq.read_table(PHOTOS, columns=["image"])["image"].to_pylist()
    for first in range(0, images, SHARD_IMAGES):
        path = folder / f"shard-{first // SHARD_IMAGES:05d}.parquet"
        if not path.exists():
            numbers = range(first, min(first + SHARD_IMAGES, images))
            shard = pa.table({"key": [f"{i:08d}" for i in numbers], "image": [_image(photos, i) for i in numbers]})
            pq.write_table(shard, path.with_suffix(".partial"), row_group_size=512)
            path.with_suffix(".partial").rename(path)


def _image(photos: list[bytes], number: int) -> bytes:
    """Encoded bytes of one image; they depend on its number alone."""
    rng = np.random.default_rng(number)
    photo = Image.open(io.BytesIO(photos[rng.integers(len(photos))])).convert("RGB")
    width, height = (round(side * share) for side, share in zip(photo.size, rng.uniform(0.4, 1.0, 2), strict=True))
    left, top = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
    sides = tuple(int(side) for side in rng.integers(*SIDES, size=2, endpoint=True))
    small = photo.resize(sides, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    content = io.BytesIO()
    small.save(content, ENCODINGS[rng.integers(len(ENCODINGS))], quality=int(rng.integers(60, 95)))
    return content.getvalue()


def main() -> None:
    """Make the gallery that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.images)


if __name__ == "__main__":
    main()
