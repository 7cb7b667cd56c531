"""Losses against float64 references written from the equations, on one rank and on two."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from cir.losses import gather_blocks, gather_rows, info_nce, semi_supervised


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def reference(queries: Any, targets: Any, ids: Any, scale: float) -> float:
    """L_c from its equation, row by row, in float64."""
    q, x = np.asarray(queries, np.float64), np.asarray(targets, np.float64)
    total = 0.0
    for i in range(len(q)):
        others = [j for j in range(len(q)) if j == i or ids[j] != ids[i]]
        total += scale * q[i] @ x[i] - np.log(sum(np.exp(scale * q[i] @ x[j]) for j in others))
        total += scale * q[i] @ x[i] - np.log(sum(np.exp(scale * q[j] @ x[i]) for j in others))
    return -total / (2 * len(q))


@pytest.mark.parametrize("scale", [1.0, 18.0, 100.0])
def test_info_nce_equals_the_equation(scale: float) -> None:
    q, x, ids = unit(12, 8, 0), unit(12, 8, 1), torch.arange(12)
    assert float(info_nce(q, x, ids, torch.tensor(scale))) == pytest.approx(reference(q, x, ids, scale), rel=1e-5)


def test_rows_with_the_same_target_are_no_negatives() -> None:
    q, x, ids = unit(6, 8, 0), unit(6, 8, 1), torch.tensor([5, 7, 5, 9, 7, 5])
    x[2], x[5], x[4] = x[0], x[0], x[1]
    masked = float(info_nce(q, x, ids, torch.tensor(20.0)))
    assert masked == pytest.approx(reference(q, x, ids, 20.0), rel=1e-5)
    assert masked < float(info_nce(q, x, torch.arange(6), torch.tensor(20.0)))


def test_a_batch_of_one_target_costs_nothing_and_has_a_finite_gradient() -> None:
    q, x = unit(4, 8, 0).requires_grad_(), unit(4, 8, 1)
    loss = info_nce(q, x, torch.zeros(4, dtype=torch.long), torch.tensor(100.0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_bf16_inputs_at_the_papers_temperature_stay_finite_and_close() -> None:
    q = unit(64, 32, 0)
    loss = info_nce(q.bfloat16(), q.bfloat16(), torch.arange(64), torch.tensor(100.0))
    assert loss.dtype == torch.float32
    rounded = q.bfloat16().float()
    assert float(loss) == pytest.approx(reference(rounded, rounded, torch.arange(64), 100.0), rel=1e-4, abs=1e-6)


def test_semi_supervised_is_the_sum_of_both_terms() -> None:
    q, x, ids = unit(10, 8, 0), unit(10, 8, 1), torch.tensor([0, 1, 2, 3, 4, 0, 6, 7, 8, 9])
    losses = semi_supervised(q, x, ids, 5, torch.tensor(10.0))
    alone, joint = reference(q[:5], x[:5], ids[:5], 10.0), reference(q, x, ids, 10.0)
    assert float(losses["loss_supervised"]) == pytest.approx(alone, rel=1e-5)
    assert float(losses["loss_joint"]) == pytest.approx(joint, rel=1e-5)
    assert float(losses["loss"]) == pytest.approx(alone + joint, rel=1e-5)


def test_without_pseudo_rows_the_loss_is_the_supervised_one() -> None:
    losses = semi_supervised(unit(5, 8, 0), unit(5, 8, 1), torch.arange(5), 5, torch.tensor(10.0))
    assert losses["loss"] is losses["loss_supervised"]
    assert float(losses["loss_joint"]) == 0.0


def test_one_rank_gathers_nothing() -> None:
    rows = unit(3, 2, 0)
    assert gather_rows(rows) is rows
    assert gather_blocks(rows, 2).equal(rows)


def toy_model() -> torch.nn.Module:
    torch.manual_seed(3)
    module = torch.nn.Linear(8, 6)
    module.register_parameter("log_scale", torch.nn.Parameter(torch.tensor([1.5])))
    return module


def toy_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, labelled: int) -> torch.Tensor:
    queries = gather_blocks(torch.nn.functional.normalize(model(inputs), dim=-1), labelled)
    count = labelled * len(queries) // len(inputs)
    scale = model.log_scale.exp().squeeze()
    return semi_supervised(queries, gather_blocks(targets, labelled), gather_blocks(ids, labelled), count, scale)["loss"]


def joined_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two ranks' rows: 4 labelled and 4 pseudo each, in the order of the joined batch; some targets repeat over ranks."""
    ids = torch.tensor([0, 1, 2, 3, 1, 5, 6, 7, 8, 0, 10, 11, 12, 13, 5, 15])
    return unit(16, 8, 5), unit(16, 6, 6), ids


def two_ranks(rank: int, folder: str) -> None:
    """One rank of two: its rows' loss, and gradients averaged over ranks as DeepSpeed does."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    inputs, targets, ids = joined_batch()
    mine = [*range(4 * rank, 4 * rank + 4), *range(8 + 4 * rank, 12 + 4 * rank)]
    model = toy_model()
    loss = toy_loss(model, inputs[mine], targets[mine], ids[mine], 4)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad)
        gradients[name] = parameter.grad / 2
    torch.save({"loss": loss.detach(), **gradients}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradients_of_one_with_the_joined_batch(tmp_path: Path) -> None:
    mp.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    model = toy_model()
    loss = toy_loss(model, *joined_batch(), labelled=8)
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, msg=f"gradient of {name} on rank {rank}")
