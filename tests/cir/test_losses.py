"""Losses and gradients against float64 references written from the equations, on one rank and on two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cir.config import LossConfig
from cir.losses import (
    Pairs,
    Unlabelled,
    contrastive,
    distinct,
    draw_negatives,
    gather_blocks,
    gather_rows,
    hn_nce,
    info_nce,
    log_weights,
    negatives,
    semi_supervised,
    target_delta_matching,
)
from tests.ranks import on_two_ranks

INFO_NCE = LossConfig()
HN_NCE = LossConfig(contrastive="hn_nce", alpha=1.0, beta=0.5)
REPEATED = [5, 7, 5, 9, 7, 5, 1, 2]


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch(n: int = 8, ids: list[int] | None = None, references: bool = False) -> Pairs:
    """Pairs whose targets are near their queries; the reference of the row 1 is its target."""
    queries = unit(n, 16, 0)
    targets = torch.nn.functional.normalize(queries + 0.7 * unit(n, 16, 1), dim=-1)
    target_ids = torch.tensor(ids) if ids else torch.arange(n)
    reference_ids = torch.arange(n) + 100
    reference_ids[1] = target_ids[1]
    return Pairs(queries, targets, target_ids, reference_ids, unit(n, 16, 2) if references else None)


def in_float64(pairs: Pairs) -> Pairs:
    fields = {name: v.double() if v is not None and v.is_floating_point() else v for name, v in vars(pairs).items()}
    return Pairs(**fields)


def rows_of(pairs: Pairs, scale: Any) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """(s_ii, s_ij of its negatives) of every query, then of every target."""
    q, x, n = pairs.queries, pairs.targets, len(pairs)
    found = []
    for i in range(n):
        others = [j for j in range(n) if pairs.target_ids[j] != pairs.target_ids[i]]
        of_query = [scale * q[i] @ x[j] for j in others]
        if pairs.references is not None and pairs.reference_ids[i] != pairs.target_ids[i]:
            of_query.append(scale * q[i] @ pairs.references[i])
        found.append((scale * q[i] @ x[i], of_query))
    for i in range(n):
        others = [j for j in range(n) if pairs.target_ids[j] != pairs.target_ids[i]]
        found.append((scale * q[i] @ x[i], [scale * q[j] @ x[i] for j in others]))
    return found


def reference(pairs: Pairs, scale: Any, config: LossConfig) -> torch.Tensor:
    """L_c from its equation, row by row, in float64 and not in log space."""
    total = torch.zeros((), dtype=torch.float64)
    for own, others in rows_of(pairs, scale):
        hard = config.contrastive == "hn_nce"
        alpha, beta = (config.alpha, config.beta) if hard else (1.0, 0.0)
        norm = sum(torch.exp(beta * s) for s in others)
        weighted = sum(len(others) * torch.exp(beta * s) / norm * torch.exp(s) for s in others)
        total = total + (torch.log(alpha * torch.exp(own) + weighted) - own) * (1 if hard else 0.5)
    return total / len(pairs)


@pytest.mark.parametrize("config", [INFO_NCE, HN_NCE, LossConfig(contrastive="hn_nce", alpha=0.7, beta=1.5)])
@pytest.mark.parametrize("references", [False, True], ids=["", "reference_negative"])
@pytest.mark.parametrize("ids", [None, REPEATED], ids=["", "repeated"])
@pytest.mark.parametrize("scale", [1.0, 18.0, 100.0])
def test_losses_and_gradients_equal_the_equations(
    config: LossConfig, references: bool, ids: list[int] | None, scale: float
) -> None:
    def loss_and_gradients(double: bool) -> list[torch.Tensor]:
        pairs = batch(ids=ids, references=references)
        pairs = in_float64(pairs) if double else pairs
        inputs = [value.requires_grad_() for value in (pairs.queries, pairs.targets, pairs.references) if value is not None]
        inputs.append(torch.tensor(scale, dtype=inputs[0].dtype, requires_grad=True))
        loss = (reference if double else contrastive)(pairs, inputs[-1], config)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    for found, expected in zip(loss_and_gradients(False), loss_and_gradients(True), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("references", [False, True])
def test_without_weights_hn_nce_is_twice_info_nce(references: bool) -> None:
    pairs = batch(ids=REPEATED, references=references)
    scale = torch.tensor(30.0)
    torch.testing.assert_close(hn_nce(pairs, scale, 1.0, 0.0), 2 * info_nce(pairs, scale))


@pytest.mark.parametrize("ids", [None, REPEATED], ids=["", "repeated"])
def test_the_weights_of_each_rows_negatives_sum_to_their_number_in_both_directions(ids: list[int] | None) -> None:
    pairs = batch(ids=ids, references=True)
    for direction, side in enumerate(negatives(pairs, torch.tensor(100.0))):
        weights = (log_weights(side, 0.5).exp() * side.mask).sum(1)
        expected = [len(others) for _, others in rows_of(pairs, 100.0)[direction * 8 : (direction + 1) * 8]]
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    assert expected == [7] * 8 or ids is not None


def test_rows_with_the_same_target_are_no_negatives() -> None:
    pairs, scale = batch(ids=REPEATED), torch.tensor(20.0)
    for config in (INFO_NCE, HN_NCE):
        assert float(contrastive(pairs, scale, config)) < float(contrastive(batch(), scale, config))


@pytest.mark.parametrize("config", [INFO_NCE, HN_NCE])
def test_a_batch_of_one_target_costs_nothing_and_has_a_finite_gradient(config: LossConfig) -> None:
    pairs = batch(ids=[3] * 8)
    pairs.queries.requires_grad_()
    loss = contrastive(pairs, torch.tensor(100.0), config)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert pairs.queries.grad is not None
    assert torch.isfinite(pairs.queries.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [INFO_NCE, HN_NCE])
@pytest.mark.parametrize("near", [True, False])
def test_at_the_papers_temperature_losses_stay_finite_and_close(dtype: torch.dtype, config: LossConfig, near: bool) -> None:
    """With every cosine near 1, e^(s) itself is far above the largest fp32; `near` is of the positives alone."""
    queries = unit(32, 16, 0) if near else torch.nn.functional.normalize(unit(32, 16, 0) * 0.02 + unit(1, 16, 1), dim=-1)
    rounded = queries.to(dtype)
    pairs = Pairs(rounded, rounded.flip(0) if not near else rounded, torch.arange(32), torch.arange(32))
    queries = pairs.queries.requires_grad_()
    loss = contrastive(pairs, torch.tensor(100.0), config)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert loss.dtype == torch.float32
    assert torch.isfinite(gradient).all()
    expected = reference(in_float64(pairs), 100.0, config)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("config", [INFO_NCE, HN_NCE])
@pytest.mark.parametrize("concat", [True, False])
def test_semi_supervised_is_the_sum_of_both_terms(config: LossConfig, concat: bool) -> None:
    pairs, scale = batch(ids=[0, 1, 2, 3, 0, 6, 7, 1], references=True), torch.tensor(10.0)
    losses = semi_supervised(pairs, 4, scale, config.model_copy(update={"concat": concat}))
    alone = reference(in_float64(pairs[:4]), 10.0, config)
    second = reference(in_float64(pairs if concat else pairs[4:]), 10.0, config)
    assert float(losses["loss_supervised"]) == pytest.approx(float(alone), rel=1e-4)
    assert float(losses["loss_joint"]) == pytest.approx(float(second), rel=1e-4)
    assert float(losses["loss"]) == pytest.approx(float(alone + second), rel=1e-4)


def test_without_pseudo_rows_the_loss_is_the_supervised_one() -> None:
    losses = semi_supervised(batch(), 8, torch.tensor(10.0), INFO_NCE)
    assert losses["loss"] is losses["loss_supervised"]
    assert float(losses["loss_joint"]) == 0.0


def duplicates() -> tuple[torch.Tensor, torch.Tensor]:
    """Target ids and tokens of six rows: 0 and 2 share the image, 1 and 2 the text, 3 and 4 both."""
    texts = torch.tensor([[1, 2, 0], [1, 3, 0], [1, 3, 0], [4, 5, 6], [4, 5, 6], [1, 2, 3]])
    return torch.tensor([10, 11, 10, 12, 12, 13]), texts


def test_negatives_never_have_the_image_or_the_text_of_the_positive() -> None:
    ids, texts = duplicates()
    allowed = distinct(ids, texts)
    for i in range(6):
        for j in range(6):
            assert bool(allowed[i, j]) == (ids[i] != ids[j] and texts[i].tolist() != texts[j].tolist())
    torch.manual_seed(0)
    drawn = torch.stack([draw_negatives(unit(6, 6, 0), allowed) for _ in range(300)])
    for i in range(6):
        assert set(drawn[:, i].tolist()) == set(allowed[i].nonzero().flatten().tolist())


def test_negatives_are_drawn_by_the_softmax_of_the_raw_cosine() -> None:
    similarities, allowed = unit(5, 5, 3), ~torch.eye(5, dtype=torch.bool)
    torch.manual_seed(0)
    drawn = torch.stack([draw_negatives(similarities, allowed) for _ in range(5000)])
    weights = (similarities.exp() / similarities.exp().sum(1, keepdim=True) + 1e-4) * allowed
    shares = torch.stack([(drawn == j).float().mean(0) for j in range(5)], 1)
    torch.testing.assert_close(shares, weights / weights.sum(1, keepdim=True), rtol=0, atol=0.03)


def test_a_row_without_a_negative_is_left_out_of_matching() -> None:
    allowed = torch.ones(4, 4, dtype=torch.bool).fill_diagonal_(False)
    allowed[2] = False
    drawn = draw_negatives(unit(4, 4, 0), allowed)
    assert (drawn < 0).tolist() == [False, False, True, False]
    logits = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    found = target_delta_matching(logits, drawn, torch.full((4,), -1))
    log_p = logits.double().log_softmax(-1)
    terms = [-log_p[0, i, 1] for i in range(4)] + [-log_p[1, i, 0] for i in (0, 1, 3)]
    assert float(found) == pytest.approx(float(sum(terms) / 7), rel=1e-5)


def test_matching_is_the_cross_entropy_of_one_positive_to_two_negatives() -> None:
    logits = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = target_delta_matching(logits, torch.tensor([1, 0, 3, 2]), torch.tensor([2, 3, 0, 1]))
    wide = logits.detach().double().requires_grad_()
    log_p = wide - torch.log(torch.exp(wide).sum(-1, keepdim=True))
    expected = -(log_p[0, :, 1].sum() + log_p[1, :, 0].sum() + log_p[2, :, 0].sum()) / 12
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (found,), (wanted,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, wide)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def test_one_rank_gathers_nothing() -> None:
    rows = unit(3, 2, 0)
    assert gather_rows(rows) is rows
    assert gather_blocks(rows, 2).equal(rows)


def toy_model() -> torch.nn.Module:
    torch.manual_seed(3)
    module = torch.nn.Linear(8, 6)
    module.register_parameter("log_scale", torch.nn.Parameter(torch.tensor([1.5])))
    return module


def joined_batch() -> dict[str, torch.Tensor]:
    """Two ranks' rows: 4 labelled and 4 pseudo each, in the order of the joined batch; some targets repeat over ranks."""
    ids = torch.tensor([0, 1, 2, 3, 1, 5, 6, 7, 8, 0, 10, 11, 12, 13, 5, 15])
    references = {"references": unit(16, 6, 7), "reference_ids": torch.tensor([3, 1, *range(30, 44)])}
    return {"inputs": unit(16, 8, 5), "targets": unit(16, 6, 6), "target_ids": ids, **references}


def toy_loss(model: Any, rows: dict[str, torch.Tensor], labelled: int, config: LossConfig) -> torch.Tensor:
    fields = {name: value for name, value in rows.items() if name != "inputs"}
    pairs = Pairs(queries=torch.nn.functional.normalize(model(rows["inputs"]), dim=-1), **fields)
    gathered = pairs.gathered(labelled)
    count = labelled * len(gathered) // len(pairs)
    return semi_supervised(gathered, count, model.log_scale.exp().squeeze(), config)["loss"]


def averaged(rank: int) -> dict[str, torch.Tensor]:
    """One rank of two: its rows' loss, and gradients averaged over ranks as DeepSpeed does."""
    mine = [*range(4 * rank, 4 * rank + 4), *range(8 + 4 * rank, 12 + 4 * rank)]
    rows = {name: value[mine] for name, value in joined_batch().items()}
    results = {}
    for config in (INFO_NCE, HN_NCE):
        model = toy_model()
        loss = toy_loss(model, rows, 4, config)
        loss.backward()
        results[f"{config.contrastive}.loss"] = loss.detach()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            torch.distributed.all_reduce(parameter.grad)
            results[f"{config.contrastive}.{name}"] = parameter.grad / 2
    return results


@pytest.mark.usefixtures("ray_session")
def test_two_ranks_give_the_loss_and_gradients_of_one_with_the_joined_batch(tmp_path: Path) -> None:
    ranks = on_two_ranks(averaged, tmp_path)
    for config in (INFO_NCE, HN_NCE):
        model = toy_model()
        loss = toy_loss(model, joined_batch(), 8, config)
        loss.backward()
        for found in ranks:
            torch.testing.assert_close(found[f"{config.contrastive}.loss"], loss.detach())
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(found[f"{config.contrastive}.{name}"], parameter.grad)


def test_targets_that_look_alike_are_no_negatives() -> None:
    targets = functional.normalize(torch.tensor([[1.0, 0.0], [0.95, 0.3], [0.0, 1.0]]), dim=-1)
    pairs = Pairs(targets, targets, torch.arange(3), torch.arange(3))
    guarded, unguarded = negatives(pairs, torch.tensor(1.0), alike=0.9)[0], negatives(pairs, torch.tensor(1.0))[0]
    assert guarded.mask.tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    assert unguarded.mask.sum() == 6


def test_unlabelled_images_are_negatives_of_queries_unless_they_are_the_target_or_alike() -> None:
    targets = functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), dim=-1)
    gallery = functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.95, 0.3, 0.0], [0.0, 0.0, 1.0]]), dim=-1)
    pairs = Pairs(
        targets, targets, torch.tensor([7, 8]), torch.tensor([1, 2]), None, Unlabelled(gallery, torch.tensor([7, 5, 6]))
    )
    queries, back = negatives(pairs, torch.tensor(2.0))
    assert queries.mask[:, 2:].tolist() == [[False, True, True], [True, True, True]]
    torch.testing.assert_close(queries.margins[:, 2:], 2 * (targets @ gallery.T) - 2)
    assert back.mask.shape == (2, 2)
    assert negatives(pairs, torch.tensor(2.0), alike=0.9)[0].mask[:, 2:].tolist() == [[False, False, True], [True, True, True]]
    assert pairs[:1].unlabelled is pairs.unlabelled
    alone = Pairs(targets, targets, torch.tensor([7, 8]), torch.tensor([1, 2]))
    assert info_nce(pairs, torch.tensor(2.0)) > info_nce(alone, torch.tensor(2.0))
