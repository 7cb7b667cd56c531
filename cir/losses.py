"""The contrastive losses of composed retrieval (PAPER 3.3), over the batch of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional


def info_nce(queries: torch.Tensor, targets: torch.Tensor, target_ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE, the mean of both directions, in fp32.

    With s_ij = scale * q_i . x_j and N(i) = {i} and all j whose target is another image than i's:
    L_c = -1/2n sum_i [ s_ii - log sum_{j in N(i)} e^{s_ij} + s_ii - log sum_{j in N(i)} e^{s_ji} ].
    Rows with the same target id are no negatives of each other. queries, targets [n, dim] of norm 1; target_ids [n].
    """
    similarities = scale.float() * queries.float() @ targets.float().T
    repeated = target_ids[:, None] == target_ids[None, :]
    repeated.fill_diagonal_(False)
    similarities = similarities.masked_fill(repeated, float("-inf"))
    own = torch.arange(len(similarities), device=similarities.device)
    return (functional.cross_entropy(similarities, own) + functional.cross_entropy(similarities.T, own)) / 2


def semi_supervised(
    queries: torch.Tensor, targets: torch.Tensor, target_ids: torch.Tensor, labelled: int, scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """L = L_c(B) + L_c(B (+) B') (PAPER 3.3, Eq. 2): the first `labelled` rows are B, the rest B'; without B', L_c(B)."""
    supervised = info_nce(queries[:labelled], targets[:labelled], target_ids[:labelled], scale)
    if labelled == len(queries):
        return {"loss": supervised, "loss_supervised": supervised, "loss_joint": torch.zeros_like(supervised)}
    joint = info_nce(queries, targets, target_ids, scale)
    return {"loss": supervised + joint, "loss_supervised": supervised, "loss_joint": joint}


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks. Every rank computes the same loss on them and gradients are averaged over ranks, so the sum
    over ranks of the gradient of the own rows is `world` times the local one: no communication on the way back."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        world = dist.get_world_size()
        return gradients[0].chunk(world)[dist.get_rank()] * world


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, ...] of all ranks as [world * n, ...], in order of rank, with gradient. Every rank gives as many rows."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


def gather_blocks(rows: torch.Tensor, first: int) -> torch.Tensor:
    """As `gather_rows`, keeping two blocks apart: the first `first` rows of all ranks, then the rest of all ranks."""
    if first == len(rows):
        return gather_rows(rows)
    return torch.cat([gather_rows(rows[:first]), gather_rows(rows[first:])])
