"""Training through the real loop: variants in local mode, once with two workers, and what wrong inputs say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from cir.compose import load_cir
from cir.config import VariantConfig
from cir.select import Pseudo
from cluster.artifacts import Output
from cluster.config import WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining.features import Features, read_mean
from tests.cir import world
from tests.cir.stages import train_cir

LOCAL = WorkerResources(workers=0)


class Trainer:
    """Trains variants on the tiny gallery."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.features = world.features(folder / "embeddings")
        self.triplets = world.triplets(folder / "labelled", world.triplet_rows(60, 0))
        rows = world.triplet_rows(100, 1, grouped=5)
        self.pseudo = Pseudo(world.triplets(folder / "pseudo", rows, np.linspace(-2, 0, 100)))

    def __call__(self, config: VariantConfig, name: str = "model", resources: WorkerResources = LOCAL, **inputs: Any) -> Output:
        output = Output(str(self.folder / name))
        given = {"features": self.features, "triplets": self.triplets, "pseudo": self.pseudo, **inputs}
        train_cir(output, **given, config=config, seed=0, resources=resources, monitor=Monitor())
        return output


@pytest.fixture
def trainer(tmp_path: Path, ray_session: None) -> Trainer:
    return Trainer(tmp_path)


def reports(output: Output) -> list[dict[str, float]]:
    return [json.loads(line) for line in output.read_bytes("metrics.jsonl").splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pseudo": True, "selection": {"ratio": 0.8, "top_fraction": 0.9}},
        {"pseudo": True, "selection": {"weight_power": 2.0}},
        {"pseudo": True, "shuffle_deltas": True},
        {"pseudo": True, "pseudo_only": True, "selection": {"groups": 10}},
        {"zero": "text"},
        {"zero": "image", "temperature": "fixed"},
    ],
    ids=["supervised", "semi", "weighted", "shuffled", "pseudo_only", "image_only", "text_only"],
)
def test_variants_train(trainer: Trainer, tiny_bert: dict[str, Any], changes: dict[str, Any]) -> None:
    config = world.variant(tiny_bert, validation={"folds": 4}, **changes)
    output = trainer(config)
    last = reports(output)[-1]
    assert np.isfinite(last["loss"])
    assert (last["loss_joint"] > 0) == (config.pseudo and not config.pseudo_only)
    result = output.read_json("result.json")
    assert result["step"] == 30
    assert result["val_mrr"] == last["val_mrr"]
    np.testing.assert_array_equal(read_mean(output), read_mean(trainer.features.embeddings))
    module = load_cir(output)
    assert module.config == config
    assert not module.training
    assert set(load(output.read_bytes("weights.safetensors"))) == {n for n, p in module.named_parameters() if p.requires_grad}


def test_training_learns_the_deltas(trainer: Trainer, tiny_bert: dict[str, Any]) -> None:
    training = {"steps": 150, "batch_size": 32, "learning_rate": 3e-3, "checkpoint_every": 50}
    output = trainer(world.variant(tiny_bert, pseudo=True, training=training, validation={"folds": 4}))
    checkpoints = [report for report in reports(output) if "val_mrr" in report]
    assert [report["step"] for report in checkpoints] == [50, 100, 150]
    assert output.read_json("result.json")["val_mrr"] == max(report["val_mrr"] for report in checkpoints)
    assert output.read_json("result.json")["val_R@10"] > 60  # a colour and shape has 3 photos of 72: chance is 14


def test_a_trained_open_clip_text_tower_with_the_combiner(trainer: Trainer, tiny_clip: dict[str, Any]) -> None:
    text = {**tiny_clip, "trained": True}
    output = trainer(world.variant(text, fusion="combiner", hidden=None, center=False, temperature="fixed", pseudo=True))
    trained, before = load(output.read_bytes("weights.safetensors")), load_cir(output).text
    assert before is not None
    first = torch.load(Path(tiny_clip["weights"]["folder"]) / "clip.pt", weights_only=True)["ln_final.weight"]
    assert not torch.equal(trained["text.tower.ln_final.weight"], first)
    assert "log_scale" not in trained


def test_a_frozen_open_clip_text_tower_is_not_saved(trainer: Trainer, tiny_clip: dict[str, Any]) -> None:
    output = trainer(world.variant(tiny_clip, fusion="combiner", hidden=None, center=False))
    assert not any(name.startswith("text") for name in load(output.read_bytes("weights.safetensors")))
    assert load_cir(output).text is not None


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bf16_trains(trainer: Trainer, tiny_bert: dict[str, Any], zero_stage: int) -> None:
    training = {"steps": 10, "batch_size": 16, "learning_rate": 1e-3, "precision": "bf16", "zero_stage": zero_stage}
    output = trainer(world.variant({**tiny_bert, "trained": True}, training=training, validation={"folds": 4}))
    assert np.isfinite(reports(output)[-1]["loss"])


@pytest.mark.workers
def test_two_deepspeed_workers_train_as_one_does(trainer: Trainer, tiny_bert: dict[str, Any]) -> None:
    """Same batches, no dropout, one view: the two workers' losses and weights are those of one with the joined batch."""
    text = {**tiny_bert, "trained": True}
    training = {"steps": 10, "batch_size": 16, "learning_rate": 1e-3, "zero_stage": 2}
    config = world.variant(text, training=training)
    features = trainer.features.embeddings
    features.write_json("info.json", {**features.read_json("info.json"), "views": 1})
    for name in [n for n in features.parts() if ".v1." in n]:
        Path(features.path(name)).unlink()
    rows = [{**row, "deltas": row["deltas"][:1]} for row in world.triplet_rows(60, 0)]
    triplets = world.triplets(trainer.folder / "plain", rows)
    one = trainer(config, "one", triplets=triplets)
    two = trainer(config, "two", WorkerResources(workers=2, cpus=1), triplets=triplets)
    assert reports(two)[-1]["loss"] == pytest.approx(reports(one)[-1]["loss"], rel=1e-3)
    expected = load(one.read_bytes("weights.safetensors"))
    for name, value in load(two.read_bytes("weights.safetensors")).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=2e-4, msg=name)


def test_wrong_inputs_are_named_before_a_worker_starts(trainer: Trainer, tiny_bert: dict[str, Any], tmp_path: Path) -> None:
    empty = world.triplets(tmp_path / "empty", [])
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"triplets": empty}, "train.triplets: 'train' .* has no triplets"),
        ({"pseudo": True}, {"pseudo": None}, "train.pseudo: .* none were generated"),
        ({"pseudo": True, "selection": {"min_score": 1.0}}, {}, "none of 100 pseudo triplets is left"),
        ({"pseudo": True, "selection": {"groups": 99}}, {}, "asked for 99, found 20 groups"),
        ({"fusion": "combiner"}, {}, "one width, found 16 and 32"),
    ]
    for changes, inputs, message in cases:
        config = world.variant(**{"text": tiny_bert, **changes})
        with pytest.raises(UserError, match=message):
            trainer(config, "wrong", **inputs)
    assert not Output(str(tmp_path / "wrong")).exists("")


def test_patch_tokens_are_refused(trainer: Trainer, tiny_bert: dict[str, Any], tmp_path: Path) -> None:
    patches = Output(str(tmp_path / "patches"))
    patches.write_json("info.json", {"tokens": 49, "dim": 16, "views": 1})
    with pytest.raises(UserError, match="one feature vector an image, the embeddings have 49"):
        trainer(world.variant(tiny_bert), features=Features(patches, center=patches))
