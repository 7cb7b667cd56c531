"""The losses of composed retrieval (PAPER 3.3). The contrastive ones see the batch of all ranks, matching a rank's own rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch.nn import functional

from cir.config import LossConfig

DRAWN_AT_LEAST = 1e-4  # added to a negative's probability of being drawn
UNUSED = -100  # label of a pair that costs nothing


class Unlabelled(NamedTuple):
    """Images of the gallery that are negatives of every query; the same on all ranks."""

    vectors: torch.Tensor  # [m, dim], of norm 1
    ids: torch.Tensor  # int64 [m]


@dataclass(frozen=True)
class Pairs:
    """Queries and their targets; all vectors are of norm 1."""

    queries: torch.Tensor  # [n, dim]
    targets: torch.Tensor  # [n, dim]
    target_ids: torch.Tensor  # int64 [n]
    reference_ids: torch.Tensor  # int64 [n]
    references: torch.Tensor | None = None  # [n, dim], target-side: given where a query's reference is its negative
    unlabelled: Unlabelled | None = None

    def __len__(self) -> int:
        return len(self.target_ids)

    def __getitem__(self, rows: slice) -> Self:
        return self._each(lambda values: values[rows])

    def gathered(self, first: int) -> Self:
        """Of all ranks, in two blocks: the first `first` rows of every rank, then the rest."""
        return self._each(lambda values: gather_blocks(values, first))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        rows = {name: values for name, values in vars(self).items() if name != "unlabelled"}
        fields: dict[str, Any] = {name: None if values is None else change(values) for name, values in rows.items()}
        return type(self)(**fields, unlabelled=self.unlabelled)


class Negatives(NamedTuple):
    """The candidates of each row, in fp32: d_ij = s_ij - s_ii with s_ij = q_i . x_j / tau, and which are negatives."""

    margins: torch.Tensor  # [n, m]
    mask: torch.Tensor  # bool [n, m]: whether candidate j is a negative of row i


def negatives(pairs: Pairs, scale: torch.Tensor, alike: float | None = None) -> tuple[Negatives, Negatives]:
    """Those of each query among the targets, and of each target among the queries; `scale` is 1 / tau.

    Rows with the same target image are no negatives of each other, nor those whose targets' cosine exceeds `alike`. Each
    query has more candidates where they are given: its own reference, and the unlabelled images; its target, and what is
    alike, is none of them.
    """
    targets, queries = pairs.targets.float(), scale.float() * pairs.queries.float()
    similarities = queries @ targets.T
    own = similarities.diagonal()[:, None]
    mask = _differ(pairs.target_ids, targets, pairs.target_ids, targets, alike)
    candidates, masks = [similarities], [mask]
    if pairs.references is not None:
        candidates.append((queries * pairs.references.float()).sum(1, keepdim=True))
        masks.append((pairs.reference_ids != pairs.target_ids)[:, None])
    if pairs.unlabelled is not None:
        vectors = pairs.unlabelled.vectors.float()
        candidates.append(queries @ vectors.T)
        masks.append(_differ(pairs.target_ids, targets, pairs.unlabelled.ids, vectors, alike))
    return Negatives(torch.cat(candidates, 1) - own, torch.cat(masks, 1)), Negatives(similarities.T - own, mask)


def _differ(
    ids: torch.Tensor, vectors: torch.Tensor, other_ids: torch.Tensor, others: torch.Tensor, alike: float | None
) -> torch.Tensor:
    """bool [n, m]: whether two images are not the same one, nor alike."""
    differ = ids[:, None] != other_ids[None, :]
    return differ if alike is None else differ & (vectors @ others.T <= alike)


def info_nce(pairs: Pairs, scale: torch.Tensor, alike: float | None = None) -> torch.Tensor:
    """Symmetric InfoNCE, the mean of both directions.

    With N(i) the negatives of row i: L_c = mean_i log( 1 + sum_{j in N(i)} e^{s_ij - s_ii} ), and the same from targets to
    queries, halved.
    """
    to_targets, to_queries = negatives(pairs, scale, alike)
    return (_log_sum(0.0, *to_targets).mean() + _log_sum(0.0, *to_queries).mean()) / 2


def hn_nce(pairs: Pairs, scale: torch.Tensor, alpha: float, beta: float, alike: float | None = None) -> torch.Tensor:
    """HN-NCE (Radenovic et al., arXiv 2301.02280), the sum of both directions, in log space.

    L_c = mean_i log( alpha + sum_{j in N(i)} w_ij e^{s_ij - s_ii} ), and the same from targets to queries, with
    w_ij = |N(i)| e^{beta s_ij} / sum_{k in N(i)} e^{beta s_ik}. The weights of a row sum to its number of negatives:
    the paper's n - 1 where no target repeats. Gradients flow through w. alpha = 1, beta = 0 is twice InfoNCE.
    """
    to_targets, to_queries = (
        _log_sum(math.log(alpha), side.margins + log_weights(side, beta), side.mask).mean()
        for side in negatives(pairs, scale, alike)
    )
    return to_targets + to_queries


def log_weights(side: Negatives, beta: float) -> torch.Tensor:
    """log w_ij of HN-NCE [n, m], for the candidates that are negatives."""
    lowest = torch.finfo(side.margins.dtype).min  # not -inf: a row may have no negative
    hardness = (beta * side.margins).masked_fill(~side.mask, lowest)
    return hardness.log_softmax(1) + side.mask.sum(1, keepdim=True).clamp(min=1).log()


def _log_sum(first: float, exponents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log( e^first + sum_j e^exponents_ij ) over the j of the mask, [n]."""
    firsts = exponents.new_full((len(exponents), 1), first)
    return torch.cat([firsts, exponents.masked_fill(~mask, float("-inf"))], 1).logsumexp(1)


# L_c by its name in a config
CONTRASTIVE: dict[str, Callable[[Pairs, torch.Tensor, LossConfig], torch.Tensor]] = {
    "info_nce": lambda pairs, scale, config: info_nce(pairs, scale, config.alike),
    "hn_nce": lambda pairs, scale, config: hn_nce(pairs, scale, config.alpha, config.beta, config.alike),
}


def contrastive(pairs: Pairs, scale: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """L_c as the config has it."""
    return CONTRASTIVE[config.contrastive](pairs, scale, config)


def semi_supervised(pairs: Pairs, labelled: int, scale: torch.Tensor, config: LossConfig) -> dict[str, torch.Tensor]:
    """L = L_c(B) + L_c(B (+) B') (PAPER 3.3, Eq. 2): the first `labelled` rows are B, the rest B'; without B', L_c(B).

    With `concat` off the second term is L_c(B') (PAPER Table 4).
    """
    supervised = contrastive(pairs[:labelled], scale, config)
    if labelled == len(pairs):
        return {"loss": supervised, "loss_supervised": supervised, "loss_joint": torch.zeros_like(supervised)}
    joint = contrastive(pairs if config.concat else pairs[labelled:], scale, config)
    return {"loss": supervised + joint, "loss_supervised": supervised, "loss_joint": joint}


def distinct(target_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """bool [n, n]: whether two rows differ in their target image (ids [n]) and in their delta (tokens [n, length])."""
    same_text = (tokens[:, None] == tokens[None, :]).all(-1)
    return (target_ids[:, None] != target_ids[None, :]) & ~same_text


def draw_negatives(similarities: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """One hard negative of each row, int64 [n]: column j with probability softmax_j(similarities) + 1e-4, normalised.

    `similarities` [n, n] are raw cosines, `allowed` bool [n, n]; -1 for a row that is allowed none.
    """
    weights = (similarities.float().softmax(1) + DRAWN_AT_LEAST) * allowed
    possible = allowed.any(1)
    drawn = torch.where(possible[:, None], weights, 1.0).multinomial(1).squeeze(1)
    return drawn.masked_fill(~possible, -1)


def target_delta_matching(logits: torch.Tensor, targets: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """L_tdm (PAPER 3.3, Eq. 3), the mean cross-entropy of "these match", one positive to two negatives.

    `logits` [3, n, 2] of (target_i, delta_i), which match, of (negative target, delta_i) and of (target_i, negative delta).
    `targets` and `deltas` [n] are the rows of the negatives; where one is -1 there was none, and the pair does not count.
    """
    unused = torch.stack([torch.zeros_like(targets, dtype=torch.bool), targets < 0, deltas < 0])
    labels = torch.zeros_like(unused, dtype=torch.long)
    labels[0] = 1
    labels[unused] = UNUSED
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=UNUSED)


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
