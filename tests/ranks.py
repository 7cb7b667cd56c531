"""A function on the two ranks of a process group."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """`work(rank)` of each. The ranks are workers of the Ray session, which have loaded torch; `folder` is where they meet."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[work.__module__])  # workers cannot import the tests

    def rank_of_two(rank: int) -> Any:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        try:
            return work(rank)
        finally:
            torch.distributed.destroy_process_group()

    return ray.get([ray.remote(rank_of_two).remote(rank) for rank in range(2)])
