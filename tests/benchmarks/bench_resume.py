"""An embed stage of which one part in a hundred is missing against the whole stage, with the start of the actors.

The start takes some seconds whatever there is to do, so the whole stage must take minutes for a ratio that says something.
"""

import math
import tempfile
import time
from pathlib import Path

from cluster.app.config import load
from cluster.artifacts import Output
from cluster.config import EmbedResources
from cluster.driver import session
from cluster.monitor import Monitor
from mining.config import GalleryConfig, IngestConfig, ViewsConfig
from mining.embed import Embed
from tests.mining.stages import ingest_gallery
from tests.stages import given

PHOTOS = Path(__file__).parents[1] / "data" / "grocery" / "train"
SHARD = 32  # 92 shards of 2,936 photos; each gives a part a view
VIEWS = ViewsConfig(count=10)
RESOURCES = EmbedResources(actors=1, decode_cpus=0.5)


def main() -> None:
    """Print the ratio of the two times."""
    with tempfile.TemporaryDirectory() as folder:
        session.start(session.RayConfig(num_cpus=2), Path(folder) / "log.txt")
        gallery = Output(f"{folder}/gallery")
        options = IngestConfig(galleries={}, triplets={}, shard_rows=SHARD)
        ingest_gallery(gallery, "bench", GalleryConfig(images=str(PHOTOS)), options, RESOURCES, Monitor())
        tower = load("grocery", []).embed.towers["photo"]
        stage = Embed(name="photo.bench", gallery=given(gallery), tower=tower, views=VIEWS, resources=RESOURCES)

        def seconds() -> float:
            began = time.perf_counter()
            stage.run(folder, Monitor())
            return time.perf_counter() - began

        whole, output = seconds(), stage.output(folder)
        parts = output.parts()
        missing = ["manifest.json", *parts[: math.ceil(len(parts) / 100)]]
        for name in missing:
            Path(output.path(name)).unlink()
        resumed = seconds()
    share = f"{len(missing) - 1} of {len(parts)} parts"
    print(f"embed: resumed ({share} missing) {resumed:.1f} s / whole {whole:.1f} s = {resumed / whole:.3f} (goal <= 0.05)")


if __name__ == "__main__":
    main()
