"""What fits beside what."""

import math

from cluster.config import ActorResources, DecodeResources, EmbedResources, TaskResources, WorkerResources
from cluster.driver.schedule import Room
from cluster.stage import Stage
from mining.config import TowerConfig, ViewsConfig
from mining.embed import Embed
from tests.stages import simple

EMBED = EmbedResources(actors=2, cpus=0.75, decode_cpus=0.25, decode_tasks=2)


def test_what_the_processes_of_a_stage_take_together() -> None:
    assert EMBED.wanted() == {"CPU": 2.0, "GPU": 0.0}
    assert DecodeResources(decode_tasks=3).wanted()["CPU"] == 3
    assert TaskResources(cpus=2, gpus=1).wanted() == {"CPU": 2, "GPU": 1}
    assert ActorResources(actors=4, gpus=1).wanted() == {"CPU": 4, "GPU": 4}
    assert WorkerResources(workers=2, cpus=3).wanted()["CPU"] == 6
    assert WorkerResources(workers=0).wanted()["CPU"] == math.inf


def test_a_stage_has_room_beside_others_where_all_fit(tower: TowerConfig) -> None:
    def embed(name: str) -> Stage:
        return Embed(name=name, gallery=light, tower=tower, views=ViewsConfig(), resources=EMBED)

    light = simple("mine:x")
    assert Room({"CPU": 4.0}).takes(embed("a"), [embed("b")])
    assert Room({"CPU": 3.0}).takes(light, [embed("b")])
    assert not Room({"CPU": 2.0}).takes(light, [embed("b")])
    assert Room({"CPU": 1.0}).takes(embed("a"), [])
    assert Room({"CPU": 1.0}, most=2).takes(embed("a"), [embed("b")])
    assert not Room({"CPU": 9.0}, most=1).takes(light, [light])
