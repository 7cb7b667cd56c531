"""The batches of composed retrieval."""

import pickle
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cir.config import Validation, VariantConfig
from cir.select import Pseudo
from cir.tasks.fusion import FusionTask
from cir.tasks.triplets import held_out
from cluster.errors import UserError
from mining.features import centred
from tests.cir import world
from tests.stages import centred_by_own


@pytest.fixture
def task(tmp_path: Path, tiny_bert: dict[str, Any]) -> FusionTask:
    return build(tmp_path, world.variant(tiny_bert, pseudo=True))


def build(folder: Path, config: VariantConfig) -> FusionTask:
    labelled = world.triplets(folder / "labelled", world.triplet_rows(30, 0))
    rows, scores = world.triplet_rows(50, 1, grouped=5), np.arange(50.0)
    pseudo = Pseudo(world.triplets(folder / "pseudo", rows, scores)) if config.pseudo else None
    return FusionTask(world.features(folder / "embeddings"), labelled, pseudo, config)


def batch(task: FusionTask, seed: int = 0) -> dict[str, Any]:
    return task.batch(np.array([3, 4, 5, 3]), np.random.default_rng(seed))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one)


def test_batches_depend_on_rows_and_generator_alone(task: FusionTask) -> None:
    fresh = pickle.loads(pickle.dumps(task))
    expected = batch(task)
    batch(fresh, 7)
    assert same(batch(fresh), expected)
    assert not same(batch(fresh, 1), expected)


def test_each_labelled_row_brings_a_pseudo_triplet(task: FusionTask) -> None:
    found = batch(task)
    assert task.size == 30
    assert found["supervised"] == 4
    assert found["reference"].shape == found["target"].shape == (8, world.DIM)
    assert found["text"].shape == (8, 32)
    labelled = {row["target_id"] for row in world.triplet_rows(30, 0)}
    pseudo = {row["target_id"] for row in world.triplet_rows(50, 1)}
    assert set(found["target_id"][:4].tolist()) <= labelled
    assert set(found["target_id"][4:].tolist()) <= pseudo


def test_triplets_of_one_target_are_refused(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    rows = [{**row, "target_id": world.triplet_rows(30, 0)[0]["target_id"]} for row in world.triplet_rows(30, 0)]
    labelled = world.triplets(tmp_path / "labelled", rows)
    for loss in ({}, {"reference_negative": True}):
        task = FusionTask(world.features(tmp_path / "embeddings"), labelled, None, world.variant(tiny_bert, loss=loss))
        with nullcontext() if loss else pytest.raises(UserError, match="all 30 triplets have the same target"):
            task.check()


def test_partners_are_drawn_by_their_weights(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    task = build(tmp_path, world.variant(tiny_bert, pseudo=True, selection={"weight_power": 4.0}))
    rng = np.random.default_rng(0)
    drawn: Counter[tuple[int, int]] = Counter()
    for _ in range(100):
        found = task.batch(np.arange(30), rng)
        drawn.update(zip(found["reference_id"][30:].tolist(), found["target_id"][30:].tolist(), strict=True))
    shares = ((np.arange(50) + 0.5) / 50) ** 4.0  # of the triplets that each one beats
    expected: Counter[tuple[int, int]] = Counter()
    for row, share in zip(world.triplet_rows(50, 1), shares / shares.sum(), strict=True):
        expected[row["reference_id"], row["target_id"]] += share
    assert all(drawn[pair] / drawn.total() == pytest.approx(share, abs=0.02) for pair, share in expected.items())


def test_partners_are_drawn_over_all_pseudo_triplets(task: FusionTask) -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([task.batch(np.arange(30), rng)["target_id"][30:] for _ in range(20)])
    assert set(drawn.tolist()) == {row["target_id"] for row in world.triplet_rows(50, 1)}


def test_pseudo_only_leaves_the_labelled_triplets_out(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    task = build(tmp_path, world.variant(tiny_bert, pseudo=True, pseudo_only=True))
    assert task.size == 50
    assert len(batch(task)["target_id"]) == batch(task)["supervised"] == 4


def test_views_are_drawn_for_references_and_when_asked_for_targets(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    def views(augment: bool) -> tuple[int, int]:
        task = build(tmp_path, world.variant(tiny_bert, augment_target=augment))
        rng = np.random.default_rng(0)
        batches = [task.batch(np.array([3]), rng) for _ in range(20)]
        return tuple(len({tuple(b[role][0].tolist()) for b in batches}) for role in ("reference", "target"))

    assert views(True) == (world.VIEWS, world.VIEWS)
    assert views(False) == (world.VIEWS, 1)


def test_features_are_centred_with_the_training_gallerys_mean(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    task = build(tmp_path, world.variant(tiny_bert, augment_target=False))
    source = task.features.open(world.IDS)
    ids = batch(task)["target_id"].numpy()
    raw = source.take(ids, np.zeros(4, int))[:, 0]
    np.testing.assert_allclose(batch(task)["target"], centred(raw, task.features.mean), rtol=1e-6)
    task = replace(task, config=world.variant(tiny_bert, augment_target=False, center=False))
    np.testing.assert_array_equal(batch(task)["target"], raw)


def test_one_delta_of_the_list_is_drawn_each_time(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    task = build(tmp_path, world.variant({**tiny_bert, "trained": True}))
    rng = np.random.default_rng(0)
    texts = {
        task._encoder.tokenizer.decode(task.batch(np.array([3]), rng)["text"][0], skip_special_tokens=True) for _ in range(20)
    }
    assert texts == set(world.triplet_rows(30, 0)[3]["deltas"])


def test_shuffled_deltas_are_the_same_texts_of_other_pairs(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    plain = build(tmp_path, world.variant(tiny_bert, pseudo=True))._tables
    mixed = build(tmp_path, world.variant(tiny_bert, pseudo=True, shuffle_deltas=True))._tables
    assert mixed[0].equals(plain[0])
    assert mixed[1].drop(["deltas"]).equals(plain[1].drop(["deltas"]))
    before, after = plain[1]["deltas"].to_pylist(), mixed[1]["deltas"].to_pylist()
    assert before != after
    assert sorted(before) == sorted(after)


def test_folds_part_the_labelled_triplets() -> None:
    ids = np.arange(1000)
    folds = np.stack([held_out(ids, Validation(folds=5, fold=i)) for i in range(5)])
    assert (folds.sum(0) == 1).all()
    assert folds.sum(1).min() > 150
    assert not held_out(ids, Validation()).any()


def test_held_out_triplets_are_validated_and_never_trained_on(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    task = build(tmp_path, world.variant(tiny_bert, validation={"folds": 3}))
    assert task.best_metric == "val_mrr"
    assert task.size + len(task._validation) == 30
    with torch.no_grad():
        found = task.validate(task.build())
    assert set(found) == {"val_R@1", "val_R@10", "val_mrr"}
    assert 0 < found["val_mrr"] <= 100
    assert found["val_R@1"] <= found["val_R@10"]
    assert build(tmp_path, world.variant(tiny_bert)).validate(None) == {}


def test_a_perfect_model_validates_at_100(tmp_path: Path, tiny_bert: dict[str, Any]) -> None:
    task = build(tmp_path, world.variant(tiny_bert, validation={"folds": 3}))
    ids, values = task._gallery

    class Oracle(torch.nn.Linear):
        def compose(self, reference: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(values[np.searchsorted(ids, task._validation.target_ids)])

    assert task.validate(Oracle(1, 1)) == {"val_R@1": 100.0, "val_R@10": 100.0, "val_mrr": 100.0}


def test_a_frozen_encoder_runs_once_a_text(task: FusionTask, monkeypatch: pytest.MonkeyPatch) -> None:
    module = task.build()
    assert not any(name.startswith("text") for name, _ in module.named_parameters())
    monkeypatch.setattr("mining.texts.load_text_encoder", None)
    again = replace(task)  # as another process does
    assert torch.isfinite(again.build()(batch(again))["loss"])


def test_cached_and_online_features_give_the_same_loss(
    tmp_path: Path, tiny_bert: dict[str, Any], photos: list[tuple[str, bytes]], ray_session: None
) -> None:
    features = world.photo_features(tmp_path, photos[:16], views=2)
    ids = world.photo_ids(photos[:16])
    rows = world.triplet_rows(16, 0)
    for i, row in enumerate(rows):
        row |= {"reference_id": ids[i], "target_id": ids[i - 5]}
    task = FusionTask(centred_by_own(features.embeddings), world.triplets(tmp_path / "t", rows), None, world.variant(tiny_bert))
    online = replace(task, features=features)
    online._source.draw_views = task._source.draw_views  # the cached views are two of the many that online ones are drawn from
    torch.manual_seed(0)
    module = task.build().eval()
    cached_batch, online_batch = (t.batch(np.arange(16), np.random.default_rng(0)) for t in (task, online))
    torch.testing.assert_close(online_batch["reference"], cached_batch["reference"], rtol=0, atol=2e-3)
    torch.testing.assert_close(module(online_batch)["loss"], module(cached_batch)["loss"], rtol=2e-3, atol=0)
