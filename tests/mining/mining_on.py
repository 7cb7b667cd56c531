"""A program that mines a folder of photos, ingest to pairs, on a running cluster; prints the nodes on which actors were."""

import json
import sys
from pathlib import Path

from cluster.artifacts import Output
from cluster.config import ActorResources, EmbedResources, TaskResources
from cluster.driver import session
from cluster.monitor import Monitor
from mining import neighbours
from mining.config import GalleryConfig, IngestConfig, TowerConfig, ViewsConfig
from tests.mining.stages import embed_gallery, find_neighbours, ingest_gallery, mine_pairs
from tests.mining.test_mine import WALK

OUTPUTS = ("gallery", "embeddings", "neighbours", "pairs")


def mine_on(address: str, photos: str, tower: TowerConfig, folder: Path, actors: int) -> list[str]:
    """Each stage with so many actors of one CPU."""
    from ray.util.state import list_actors

    session.start(session.RayConfig(address=address))
    neighbours.BLOCK = 16
    gallery, embeddings, nearest, pairs = (Output(str(folder / name)) for name in OUTPUTS)
    decoding = EmbedResources(actors=actors, cpus=0.75, decode_cpus=0.25, decode_tasks=2, batch_size=16)
    options = IngestConfig(galleries={}, triplets={}, shard_rows=16)
    ingest_gallery(gallery, "photos", GalleryConfig(images=photos), options, decoding, Monitor())
    embed_gallery(embeddings, gallery, tower, ViewsConfig(count=2), decoding)
    find_neighbours(nearest, embeddings, None, WALK, ActorResources(actors=actors))
    mine_pairs(pairs, embeddings, None, None, WALK, 0, TaskResources(), Monitor())
    found = {actor.node_id for actor in list_actors(limit=1000) if actor.class_name.startswith("MapWorker")}
    return sorted(str(node) for node in found if node)  # None: it was never placed


if __name__ == "__main__":
    address, photos, tower, folder, actors = sys.argv[1:]
    nodes = mine_on(address, photos, TowerConfig.model_validate_json(tower), Path(folder), int(actors))
    print(json.dumps(nodes), flush=True)
