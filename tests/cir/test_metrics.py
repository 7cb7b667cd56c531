"""Metrics by hand, and block-wise ranking against brute force."""

from functools import partial

import numpy as np
import pytest

from cir import metrics
from cir.benchmarks.benchmark import recalls
from cluster.errors import UserError


def brute_force(
    queries: np.ndarray, ids: np.ndarray, gallery: np.ndarray, references: np.ndarray, targets: np.ndarray
) -> list[list[int]]:
    """All ids for each query, best first, the reference removed."""
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    orders = [ids[np.argsort(-(unit @ q), kind="stable")].tolist() for q in queries]
    return [[i for i in order if i != r] for order, r in zip(orders, references.tolist(), strict=True)]


@pytest.mark.parametrize("block", [1, 7, 40])
def test_blocks_give_the_ranking_of_brute_force(block: int) -> None:
    rng = np.random.default_rng(0)
    gallery, ids = rng.normal(size=(40, 8)).astype(np.float32), rng.permutation(1000)[:40]
    queries = rng.normal(size=(25, 8)).astype(np.float32)
    places = rng.integers(40, size=25)
    references, targets = ids[places], ids[(places + 1 + rng.integers(39, size=25)) % 40]
    vectors = {i: v for i, v in zip(ids.tolist(), gallery, strict=True)}
    blocks = [(ids[i : i + block], gallery[i : i + block]) for i in range(0, 40, block)]
    found = metrics.rank(queries, blocks, references, targets, np.stack([vectors[t] for t in targets.tolist()]), top=10)
    expected = brute_force(queries, ids, gallery, references, targets)
    assert found.image_ids.tolist() == [order[:10] for order in expected]
    assert found.target_rank.tolist() == [order.index(t) + 1 for order, t in zip(expected, targets.tolist(), strict=True)]


def test_the_reference_is_removed_and_told_when_it_would_have_been_first() -> None:
    gallery, ids = np.eye(3, dtype=np.float32), np.array([10, 11, 12])
    queries = np.array([[1.0, 0.5, 0.0], [0.1, 1.0, 0.5]], np.float32)
    found = metrics.rank(queries, [(ids, gallery)], np.array([10, 10]), np.array([11, 12]), gallery[[1, 2]], top=2)
    assert found.image_ids.tolist() == [[11, 12], [11, 12]]
    assert found.target_rank.tolist() == [1, 2]
    assert found.reference_first.tolist() == [True, False]


def test_a_ranking_longer_than_the_gallery_is_filled_up() -> None:
    gallery = np.eye(2, dtype=np.float32)
    blocks = [(np.array([4, 5]), gallery)]
    found = metrics.rank(np.ones((1, 2), np.float32), blocks, np.array([4]), np.array([5]), gallery[[1]], top=4)
    assert found.image_ids.tolist() == [[5, metrics.NO_IMAGE, metrics.NO_IMAGE, metrics.NO_IMAGE]]


@pytest.mark.parametrize("kind", ["query", "target", "gallery"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_model_is_no_perfect_one(kind: str, value: float) -> None:
    vectors = {name: np.eye(2, dtype=np.float32) for name in ("query", "target", "gallery")}
    vectors[kind][1, 0] = value
    ids, blocks = np.array([4, 5]), [(np.array([4, 5]), vectors["gallery"])]
    with pytest.raises(UserError, match=f"1 of 2 {kind} vectors are not finite: .*diverged; lower its learning rate"):
        metrics.rank(vectors["query"], blocks, ids[::-1], ids, vectors["target"], top=1)


def test_recall_and_reciprocal_rank() -> None:
    ranks = np.array([1, 2, 4, 20])
    assert [metrics.recall(ranks, k) for k in (1, 5, 50)] == [25.0, 75.0, 100.0]
    assert metrics.mean_reciprocal_rank(ranks) == pytest.approx(100 * (1 + 0.5 + 0.25 + 0.05) / 4)


def test_images_that_score_alike_share_their_mean_rank() -> None:
    """A target among t others of its score ranks at 1 + the higher ones + t / 2, wherever it stands in the gallery."""
    ids, gallery = np.arange(9), np.repeat(np.eye(3, dtype=np.float32), 3, axis=0)
    queries = np.array([[0, 0, 0], [1, 0.5, 0], [1, 0.5, 0], [0.5, 1, 0.2]], np.float32)
    references, targets = np.array([0, 0, 0, 3]), np.array([8, 1, 5, 8])
    blocks = [(ids[i : i + 2], gallery[i : i + 2]) for i in range(0, 9, 2)]
    found = metrics.rank(queries, blocks, references, targets, gallery[targets], top=9)
    assert found.target_rank.tolist() == [4.5, 1.5, 4.0, 7.0]
    assert found.image_ids[1].tolist()[:2] == [1, 2]


def test_queries_without_content_find_nothing() -> None:
    ids, gallery = np.arange(100), np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    ranks = metrics.rank(np.zeros((100, 8), np.float32), [(ids, gallery)], ids[::-1], ids, gallery, top=10).target_rank
    assert set(ranks.tolist()) == {50.0}
    assert metrics.mean_reciprocal_rank(ranks) == pytest.approx(2.0)
    assert metrics.recall(ranks, 10) == 0.0


def test_copies_of_the_target_tie_with_it_whatever_the_rounding() -> None:
    rng = np.random.default_rng(0)
    gallery = np.repeat(rng.normal(size=(20, 384)).astype(np.float32), 2, axis=0)
    queries, targets = gallery + rng.normal(size=gallery.shape).astype(np.float32), np.arange(40)
    found = metrics.rank(queries, [(targets, gallery)], np.full(40, -5), targets, gallery, top=1)
    assert set(found.target_rank.tolist()) == {1.5}


def test_several_answers_are_right_when_their_attributes_equal_the_targets() -> None:
    classes = {1: 0, 2: 0, 3: 1}
    found = metrics.correct_by_attributes(np.array([[2, 3, 9], [1, 3, -1]]), np.array([1, 3]), classes)
    assert found.tolist() == [[True, False, False], [False, True, False]]


def test_groups_are_ranked_without_the_reference() -> None:
    queries = np.array([[1.0, 0.0], [0.0, 1.0]])
    members = [np.array([1, 2, 3]), np.array([4, 5])]
    features = np.array([[1.0, 0.0], [0.5, 0.5], [0.9, 0.1], [0.0, 1.0], [1.0, 0.2]])
    ranked = metrics.rank_groups(queries, members, features, np.array([1, 4]))
    assert [group.image_ids.tolist() for group in ranked] == [[3, 2], [5]]
    assert [ranked[0].rank_of(3), ranked[0].rank_of(2), ranked[1].rank_of(5)] == [1.0, 2.0, 1.0]


def test_members_of_a_group_that_score_alike_share_their_mean_rank() -> None:
    (group,) = metrics.rank_groups(
        np.zeros((1, 2)), [np.arange(6)], np.random.default_rng(0).normal(size=(6, 2)), np.array([2])
    )
    assert [group.rank_of(image) for image in (0, 1, 3, 4, 5)] == [3.0] * 5


def test_bootstrap_gives_the_mean_gain_and_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    baseline = (rng.random(1500) < 0.5).astype(float)
    better = np.maximum(baseline, rng.random(1500) < 0.1)
    gain = metrics.paired_bootstrap(better, baseline)
    spread = 196 * (better - baseline).std() / np.sqrt(1500)
    assert gain.mean == pytest.approx(100 * (better - baseline).mean())
    assert gain.low == pytest.approx(gain.mean - spread, abs=0.1)
    assert gain.high == pytest.approx(gain.mean + spread, abs=0.1)
    assert gain == metrics.paired_bootstrap(better, baseline)


def test_equal_models_gain_nothing() -> None:
    hits = np.array([0.0, 1.0, 1.0])
    assert metrics.paired_bootstrap(hits, hits, resamples=10) == metrics.Estimate(0.0, 0.0, 0.0)


def test_recalls_and_average_precision_agree_with_trec_eval() -> None:
    import pytrec_eval

    rng = np.random.default_rng(0)
    queries, gallery, ks = 60, 80, (5, 10, 25, 50)
    ranked = np.stack([rng.permutation(gallery)[:50] for _ in range(queries)])
    right = [rng.choice(gallery, size=rng.integers(1, 15), replace=False) for _ in range(queries)]
    correct = np.stack([np.isin(row, ids) for row, ids in zip(ranked, right, strict=True)])
    judged = {str(i): {str(image): 1 for image in ids} for i, ids in enumerate(right)}
    run = {str(i): {str(image): 50.0 - place for place, image in enumerate(row)} for i, row in enumerate(ranked.tolist())}
    cuts = ",".join(map(str, ks))
    found = pytrec_eval.RelevanceEvaluator(judged, {f"map_cut.{cuts}", f"success.{cuts}"}).evaluate(run)
    counts = np.array([len(ids) for ids in right])
    for k in ks:
        theirs = (
            np.array([found[str(i)][f"map_cut_{k}"] for i in range(queries)]) * counts
        )  # trec_eval divides by all right ones
        assert metrics.average_precision(correct, counts, k) == pytest.approx(theirs / np.minimum(counts, k))
        success = np.array([found[str(i)][f"success_{k}"] for i in range(queries)])
        assert recalls(correct, [k])[f"R@{k}"] == pytest.approx(success)


@pytest.mark.parametrize("removed", [True, False])
def test_galleries_are_searched_apart(removed: bool) -> None:
    rng = np.random.default_rng(0)
    gallery, ids = rng.normal(size=(40, 8)).astype(np.float32), np.arange(100, 140)
    queries, half = rng.normal(size=(6, 8)).astype(np.float32), (ids[:25], ids[15:])
    references, targets = ids[[0, 1, 2, 30, 31, 32]], ids[[5, 20, 35, 35, 20, 5]]  # the third and last targets are elsewhere
    search = metrics.QuerySet(references, targets, removed, half, np.array([0, 0, 0, 1, 1, 1]))
    blocks = [(ids[i : i + 7], gallery[i : i + 7]) for i in range(0, 40, 7)]
    (found,) = metrics.rank_all(queries, blocks, [search], gallery[targets - 100], top=40)
    expected = [
        [i for i in order if i in set(half[row // 3].tolist()) and not (removed and i == references[row])]
        for row, order in enumerate(brute_force(queries, ids, gallery, np.full(6, -1), targets))
    ]
    assert [[i for i in row if i != metrics.NO_IMAGE] for row in found.image_ids.tolist()] == expected
    ranks = [
        order.index(t) + 1 if t in order else metrics.UNRANKED for order, t in zip(expected, targets.tolist(), strict=True)
    ]
    assert found.target_rank.tolist() == ranks
    assert ranks.count(metrics.UNRANKED) == 2


def test_queries_for_one_thing_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(50), 20)
    baseline = np.zeros(1000)
    hits = np.repeat((rng.random(50) < 0.3).astype(float), 20)
    alone, together = (metrics.paired_bootstrap(hits, baseline, by) for by in (None, classes))
    assert alone.mean == together.mean
    assert together.high - together.low == pytest.approx(np.sqrt(20) * (alone.high - alone.low), rel=0.1)


def test_the_gap_closed_is_a_share_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    baseline = (rng.random(1000) < 0.2).astype(float)
    best = np.maximum(baseline, rng.random(1000) < 0.4)
    half = np.where(np.arange(1000) % 2, best, baseline)
    gap = metrics.gap_closed(half, baseline, best, resamples=1000)
    assert gap is not None
    assert gap.low < 0.5 < gap.high
    assert gap.mean == pytest.approx((half - baseline).mean() / (best - baseline).mean())
    assert metrics.gap_closed(half, baseline, baseline, resamples=10) is None
    rare = np.where(np.arange(len(best)) < 2, 1.0 - baseline, 0.0) + baseline  # many a resample has neither of the two
    assert metrics.gap_closed(rare, baseline, rare, resamples=1000) == metrics.Estimate(1.0, 1.0, 1.0)


def test_generators_are_resampled_too() -> None:
    rng = np.random.default_rng(0)
    baseline, offsets = np.zeros(5000), rng.normal(0.1, 0.05, size=(8, 1))
    hits = (rng.random((8, 5000)) < offsets.clip(0)).astype(float)
    gain = metrics.paired_bootstrap(hits, baseline, resamples=2000)
    alone = metrics.paired_bootstrap(hits.mean(axis=0), baseline, resamples=2000)
    assert gain.mean == pytest.approx(alone.mean)
    by_generator = 100 * hits.mean(axis=1).std(ddof=1) / np.sqrt(8)
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * by_generator, rel=0.1)  # there are so many queries
    assert gain.high - gain.low > 5 * (alone.high - alone.low)


def test_one_generator_is_resampled_as_none() -> None:
    rng = np.random.default_rng(0)
    hits, baseline, best = (rng.random(200) < share for share in (0.4, 0.3, 0.8))
    hits, baseline, best = hits.astype(float), baseline.astype(float), best.astype(float)
    bootstrap, gap_closed = (partial(each, resamples=1000) for each in (metrics.paired_bootstrap, metrics.gap_closed))
    assert bootstrap(hits[None], baseline[None]) == bootstrap(hits, baseline)
    assert gap_closed(hits[None], baseline, best[None]) == gap_closed(hits, baseline, best)
    three = gap_closed(np.stack([hits] * 3), baseline, best)
    assert three is not None
    assert three.mean == pytest.approx((hits - baseline).mean() / (best - baseline).mean())
