"""What fits beside what."""

import math
from threading import Event

from cluster.config import ActorResources, DecodeResources, EmbedResources, TaskResources, WorkerResources
from cluster.driver.schedule import Room, Schedule, Work
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


def test_a_stage_that_waits_begins_when_it_need_not_any_longer() -> None:
    """The first ends after the second alone: that one is looked at again though none has ended."""
    asked: list[tuple[str, list[str]]] = []
    begun = Event()

    def do(work: Work) -> None:
        if work[0].name == "b":
            begun.set()
        assert begun.wait(10)

    def wait(stage: Stage, beside: list[Stage]) -> bool:
        asked.append((stage.name, [each.name for each in beside]))
        return bool(beside) and len(asked) < 4

    stages = [simple("mine:a"), simple("mine:b")]
    Schedule(stages, Room({"CPU": 2.0}), do).run(first=lambda stage: False, wait=wait, started=lambda running, waiting: None)
    assert asked == [("a", []), ("b", ["a"]), ("b", ["a"]), ("b", ["a"])]


def test_stages_that_join_one_another_begin_together(tower: TowerConfig) -> None:
    done: list[list[str]] = []
    views = ViewsConfig()
    stages = [Embed(name=n, gallery=simple("mine:x"), tower=tower, views=views, resources=EMBED) for n in ("a", "b")]
    later = Embed(name="c", gallery=stages[0], tower=tower, views=views, resources=EMBED)
    waiting: list[Stage] = [simple("mine:y"), stages[0], later, stages[1]]
    Schedule(waiting, Room({"CPU": 2.0}), lambda work: done.append([stage.name for stage in work])).run(
        first=lambda stage: isinstance(stage, Embed), wait=lambda stage, beside: False, started=lambda running, waiting: None
    )
    assert done == [["a", "b"], ["c"], ["y"]]
