"""Batches of both tasks."""

import pickle

import numpy as np
import pytest
import torch

from cluster.config import TrainingConfig
from mining.features import read_mean
from tests.stages import centred_by_own
from vdg.align import AlignTask
from vdg.backbones.base import IGNORED
from vdg.backbones.features import prepare
from vdg.backbones.language import collate
from vdg.config import AlignConfig, InstructConfig
from vdg.description import describe
from vdg.instruct import InstructTask
from vdg.prompts import IMAGE

TOKENS, DIM = 2, 8  # of the `embeddings` fixture

TRAINING = TrainingConfig(steps=4, batch_size=4, learning_rate=1e-3)
ROWS = np.array([3, 0, 7, 8])


def test_collate_aligns_each_position_with_the_next_id():
    batch = collate([[5, 6], [5, 6, 7]], [[8, 9, 1], [1]])
    assert batch["ids"].tolist() == [[5, 6, 8, 9], [5, 6, 7, 0]]
    assert batch["targets"].tolist() == [[IGNORED, 8, 9, 1], [IGNORED, IGNORED, 1, IGNORED]]


def test_prepared_features_are_centred_to_norm_sqrt_dim(vdg):
    values, mean = np.random.default_rng(0).normal(size=(3, TOKENS, DIM)).astype(np.float32), np.ones(DIM, np.float32)
    prepared = prepare(values, mean, vdg())
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared.norm(dim=-1), torch.full((3, TOKENS), DIM**0.5))
    expected = torch.from_numpy(values - 1)
    torch.testing.assert_close(torch.cosine_similarity(prepared, expected, -1), torch.ones(3, TOKENS))
    np.testing.assert_array_equal(prepare(values, mean, vdg(center=False)), values)


def _instruct(embeddings, triplets, vdg, held_out: float = 0.0) -> InstructTask:
    features = centred_by_own(embeddings)
    config = InstructConfig(training=TRAINING, held_out=held_out)
    return InstructTask(features, triplets, None, describe("instruct", features, vdg()), config)


def test_instruct_batch_holds_both_images_of_each_triplet(embeddings, triplets, vdg):
    task = _instruct(embeddings, triplets, vdg)
    batch = task.batch(ROWS, np.random.default_rng(0))
    assert batch["features"].shape == (4, 2, TOKENS, DIM)
    assert ((batch["ids"] == IMAGE).sum(1) == 2 * TOKENS * 3).all()
    source, mean = centred_by_own(embeddings).open(np.arange(12)), read_mean(embeddings)
    for place, images in enumerate((ROWS % 12, (ROWS * 5 + 3) % 12)):
        views = [prepare(source.take(images, np.full(4, view)), mean, vdg()) for view in range(2)]
        matches = [[torch.allclose(batch["features"][row, place], view[row]) for view in views] for row in range(4)]
        assert all(any(row) for row in matches)


def test_batches_depend_on_the_generator_alone(embeddings, triplets, captions, vdg):
    features = centred_by_own(embeddings)
    align = AlignTask(features, captions, describe("align", features, vdg()), AlignConfig(training=TRAINING))
    for task in (_instruct(embeddings, triplets, vdg), align):
        first = task.batch(ROWS, np.random.default_rng(4))
        again = pickle.loads(pickle.dumps(task)).batch(ROWS, np.random.default_rng(4))
        other = task.batch(ROWS, np.random.default_rng(5))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["features"], other["features"])


def test_every_delta_of_the_list_is_drawn(embeddings, triplets, vdg):
    task = _instruct(embeddings, triplets, vdg)
    lengths = {int((task.batch(np.array([0]), np.random.default_rng(s))["targets"] != IGNORED).sum()) for s in range(10)}
    assert len(lengths) == 2


def test_held_out_triplets_are_a_stable_share(embeddings, triplets, vdg):
    half, more = (_instruct(embeddings, triplets, vdg, held_out) for held_out in (0.5, 0.7))
    kept = [set(task._training["triplet_id"].to_pylist()) for task in (half, more)]
    assert half.size + len(half._validation) == 24
    assert 0 < more.size < half.size < 24
    assert kept[1] < kept[0]


def test_validation_loss_is_a_mean_over_tokens(embeddings, triplets, vdg, monkeypatch):
    task = _instruct(embeddings, triplets, vdg, 0.5)
    module = task.build().eval()
    with torch.no_grad():
        whole = task.validate(module)["negative_val_loss"]
        monkeypatch.setattr("vdg.instruct.VALIDATION_BATCH", 2)
        assert task.validate(module)["negative_val_loss"] == pytest.approx(whole, abs=1e-5)
    assert _instruct(embeddings, triplets, vdg).validate(module) == {}
