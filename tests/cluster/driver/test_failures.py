"""What is left of a user's mistake behind Ray's exceptions."""

from typing import Any

import pytest
import ray
import ray.data

from cluster.driver.failures import explained
from cluster.errors import UserError


class Mistaken:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        raise UserError("vectors.parquet: not finite\ntrain again")


@explained
def work() -> None:
    ray.data.range(1).map_batches(Mistaken, compute=ray.data.ActorPoolStrategy(size=1)).materialize()


def test_a_mistake_that_an_actor_finds_is_said(ray_session: None) -> None:
    with pytest.raises(UserError, match=r"^vectors\.parquet: not finite\ntrain again$"):
        work()


@explained
def task() -> None:
    @ray.remote
    def mistaken() -> None:
        raise UserError("train.json: row 3 has no target")

    ray.get(mistaken.remote())


def test_a_mistake_that_a_task_finds_comes_without_rays_traceback(ray_session: None) -> None:
    with pytest.raises(UserError, match=r"^train\.json: row 3 has no target$") as raised:
        task()
    assert type(raised.value) is UserError
