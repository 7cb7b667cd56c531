"""BLIP as a retrieval model: its queries, losses and frozen parts; training and evaluation end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from transformers import AutoTokenizer, BlipForImageTextRetrieval, BlipImageProcessor

from cir.benchmarks import triplets
from cir.compose import Composer, load_cir
from cir.config import EvaluateConfig, VariantConfig
from cir.evaluate import RANKINGS
from cir.models.blip import BlipRetrieval
from cir.select import Pseudo
from cir.tasks import TASKS
from cluster.artifacts import Output
from cluster.config import ActorResources, WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.weights import Weights
from mining import tables
from mining.config import TowerConfig, ViewsConfig
from mining.features import AugmentedViews, Features
from tests.cir import world
from tests.cir.stages import evaluate, train_cir
from tests.ranks import on_two_ranks

TEXTS = ["make it red", "a much longer delta that asks for a green cone", "in blue", "no label " * 30]


def module(tower: TowerConfig, **changes: Any) -> BlipRetrieval:
    torch.manual_seed(0)
    return BlipRetrieval(world.blip_variant(**changes), tower).eval()


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def library(tower: TowerConfig) -> tuple[Any, Any, Any]:
    """transformers' own model, tokeniser and image processor of the same weights."""
    folder = tower.weights.location() if tower.weights else ""
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), BlipImageProcessor.from_pretrained(folder)


def rows(model: BlipRetrieval, texts: list[str], supervised: int, seed: int = 0) -> dict[str, Any]:
    n = len(texts)
    images = {"reference": pixels(n, seed), "target": pixels(n, seed + 1)}
    ids = {"reference_id": torch.arange(n) + 100, "target_id": torch.arange(n)}
    return {**images, **ids, "text": model.tokenize(texts), "supervised": supervised}


@torch.no_grad()
def test_queries_and_targets_are_those_of_transformers_own_modules(tiny_blip: TowerConfig) -> None:
    model, images = module(tiny_blip), pixels(4)
    blip, tokenizer, processor = library(tiny_blip)
    queries = model.compose(images, model.tokenize(TEXTS))
    targets = model._project(model._patches(images))
    for i, text in enumerate(TEXTS):
        tokens = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        inputs = processor(images[i].numpy(), do_resize=False, return_tensors="pt")
        grounded = blip(tokens["input_ids"], inputs["pixel_values"], attention_mask=tokens["attention_mask"])
        expected = torch.nn.functional.normalize(blip.text_proj(grounded.question_embeds[:, 0]), dim=-1)
        torch.testing.assert_close(queries[i : i + 1], expected, rtol=1e-4, atol=1e-5)
        projected = torch.nn.functional.normalize(blip.vision_proj(grounded.last_hidden_state[:, 0]), dim=-1)
        torch.testing.assert_close(targets[i : i + 1], projected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_matching_averages_the_heads_logits_over_all_tokens_but_cls(tiny_blip: TowerConfig) -> None:
    model, images = module(tiny_blip), pixels(4)
    blip, tokenizer, _ = library(tiny_blip)
    found = model._match(model._patches(images), model.tokenize(TEXTS))
    for i, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        patches = model._patches(images[i : i + 1])
        states = blip.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        torch.testing.assert_close(found[i], blip.itm_head(states)[0, 1:].mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_matching_tells_two_pairs_from_both_their_exchanges(tiny_blip: TowerConfig) -> None:
    """Two rows leave one negative each, so that nothing about the draw is random."""
    model = module(tiny_blip)
    batch = rows(model, TEXTS[:2], supervised=2)
    patches = model._patches(batch["target"])
    expected = []
    for image, text, label in [(0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 1, 0), (1, 0, 0)]:
        logits = model._match(patches[[image]], batch["text"][[text]])
        expected.append(-logits.log_softmax(1)[0, label])
    found = model(batch)
    torch.testing.assert_close(found["loss_tdm"], torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], found["loss_supervised"] + found["loss_tdm"])


@torch.no_grad()
def test_a_semi_supervised_step_sums_three_losses(tiny_blip: TowerConfig) -> None:
    model = module(tiny_blip)
    found = model(rows(model, [*TEXTS, "in red", "in white"], supervised=3))
    assert set(found) == {"loss", "loss_supervised", "loss_joint", "loss_tdm", "temperature"}
    assert float(found["loss_joint"]) > 0
    torch.testing.assert_close(found["loss"], found["loss_supervised"] + found["loss_joint"] + found["loss_tdm"])
    assert "loss_tdm" not in module(tiny_blip, loss={})(rows(model, TEXTS, supervised=2))


@torch.no_grad()
def test_the_reference_is_a_negative_by_its_own_projected_feature(tiny_blip: TowerConfig) -> None:
    plain, harder = (module(tiny_blip, loss={"reference_negative": on}) for on in (False, True))
    batch = rows(plain, TEXTS, supervised=4)
    queries = harder.compose(batch["reference"], batch["text"])
    targets, references = (harder._project(harder._patches(batch[role])) for role in ("target", "reference"))
    scale = 1 / 0.07
    to_targets = scale * torch.cat([queries @ targets.T, (queries * references).sum(1, keepdim=True)], 1)
    own = torch.arange(4)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(to_targets, own) + entropy(scale * targets @ queries.T, own)) / 2
    torch.testing.assert_close(harder(batch)["loss"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(batch)["loss"], expected)


def test_the_temperature_starts_at_7_percent_and_is_clamped(tiny_blip: TowerConfig) -> None:
    model = module(tiny_blip)
    assert model.temperature is not None
    for value, used in ((None, 0.07), (3.0, 0.5), (-1.0, 0.001)):
        if value is not None:
            torch.nn.init.constant_(model.temperature, value)
        assert 1 / float(model.scale(model.temperature).detach()) == pytest.approx(used)
    fixed = module(tiny_blip, temperature="fixed")
    assert fixed.temperature is None
    assert float(fixed.scale(torch.zeros(1))) == pytest.approx(100.0)


@pytest.mark.parametrize("temperature", ["fixed", "learned"])
def test_bf16_gives_finite_losses_and_gradients(tiny_blip: TowerConfig, temperature: str) -> None:
    model = module(tiny_blip, temperature=temperature).bfloat16()
    losses = model(rows(model, TEXTS, supervised=2))
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert {name.split(".")[1] for name in gradients if name != "temperature"} == {"text_encoder", "text_proj"}
    assert ("temperature" in gradients) == (temperature == "learned")


TWO_RANKS = [*TEXTS, "in red", "in white", "in black", "a cube"]


def matching_of(tower: TowerConfig, rank: int) -> torch.Tensor:
    """Matching loss of the rows of one rank of two, with a seed of its own."""
    model = module(tower)
    batch = rows(model, TWO_RANKS[4 * rank : 4 * rank + 4], supervised=2, seed=10 * rank)
    batch["target_id"] += 4 * rank
    torch.manual_seed(rank)
    with torch.no_grad():
        return model(batch)["loss_tdm"]


@pytest.mark.usefixtures("ray_session")
def test_every_rank_matches_its_own_rows(tiny_blip: TowerConfig, tmp_path: Path) -> None:
    def matching(rank: int) -> torch.Tensor:
        return matching_of(tiny_blip, rank)

    for rank, found in enumerate(on_two_ranks(matching, tmp_path)):
        torch.testing.assert_close(found, matching(rank))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, tiny_blip: TowerConfig, ray_session: None) -> Features:
    return world.blip_features(tmp_path_factory.mktemp("pictures"), tiny_blip)


def train(folder: Path, features: Features, config: VariantConfig) -> Output:
    output = Output(str(folder / "model"))
    labelled = world.triplets(folder / "labelled", world.triplet_rows(60, 0))
    pseudo = Pseudo(world.triplets(folder / "pseudo", world.triplet_rows(80, 1, grouped=5)))
    train_cir(output, features, labelled, pseudo, config, 0, WorkerResources(workers=0), Monitor())
    return output


def reports(output: Output) -> list[dict[str, float]]:
    return [json.loads(line) for line in output.read_bytes("metrics.jsonl").splitlines()]


def test_cached_embeddings_are_the_plain_targets_of_training(pictures: Features, tiny_blip: TowerConfig) -> None:
    ids, plain = world.IDS[:6], np.zeros(6, int)
    cached = torch.from_numpy(pictures.open_plain(ids).take(ids, plain)[:, 0])
    assert pictures.online is not None
    model, images = module(tiny_blip), AugmentedViews(pictures.online, ids)
    seen = model._project(model._patches(torch.from_numpy(images.take(ids, plain))))
    torch.testing.assert_close(torch.nn.functional.normalize(cached, dim=-1), seen, rtol=0, atol=2e-3)
    augmented = images.take(ids, images.draw_views(6, np.random.default_rng(0)))
    assert not np.array_equal(augmented, images.take(ids, plain))


def test_batches_are_pixels_and_tokens_that_depend_on_the_generator_alone(pictures: Features, tmp_path: Path) -> None:
    labelled = world.triplets(tmp_path / "labelled", world.triplet_rows(30, 0))
    pseudo = Pseudo(world.triplets(tmp_path / "pseudo", world.triplet_rows(40, 1)))
    task = TASKS["blip"](pictures, labelled, pseudo, world.blip_variant(pseudo=True))
    found, again = (task.batch(np.array([3, 4, 5]), np.random.default_rng(0)) for _ in range(2))
    assert found["reference"].shape == found["target"].shape == (6, 32, 32, 3)
    assert found["reference"].dtype == torch.uint8
    assert found["text"].dtype == torch.int64
    assert found["supervised"] == 3
    assert all(torch.equal(found[name], again[name]) for name in found if name != "supervised")
    fields = {"reference_id": "reference_id", "target_id": "target_id"}
    for name, field in fields.items():
        assert found[name][:3].tolist() == [row[field] for row in world.triplet_rows(30, 0)[3:6]]


def test_training_learns_and_leaves_the_frozen_parts_alone(pictures: Features, tiny_blip: TowerConfig, tmp_path: Path) -> None:
    assert pictures.online is not None
    plain = replace(pictures.online, views=ViewsConfig(crop=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, jitter=0.0))
    training = {"steps": 100, "batch_size": 16, "learning_rate": 3e-3, "schedule": "constant"}
    output = train(tmp_path, replace(pictures, online=plain), world.blip_variant(training=training, validation={"folds": 4}))
    lines = reports(output)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert lines[-1]["loss_supervised"] < 0.8 * 2 * np.log(16)  # of a model that knows nothing
    assert lines[-1]["loss_tdm"] < 0.9 * (np.log(3) - 2 / 3 * np.log(2))  # of one that knows the shares alone
    trained, before = load(output.read_bytes("weights.safetensors")), module(tiny_blip)
    assert {name.split(".")[1] for name in trained if name != "temperature"} == {"text_encoder", "text_proj"}
    states = before.state_dict()
    for name, value in load_cir(output).state_dict().items():
        if name not in trained:
            assert torch.equal(value, states[name]), name
    for name in ("temperature", "blip.text_proj.weight", "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"):
        assert not torch.equal(trained[name], states[name]), name
    assert output.read_json("result.json")["val_R@10"] > 1.5 * 100 * 10 / world.COUNT  # chance


def test_a_reloaded_model_composes_the_queries_of_its_images(pictures: Features, tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    output = train(tmp_path, pictures, world.blip_variant(pseudo=True, training=training))
    assert pictures.online is not None
    assert reports(output)[-1]["loss_joint"] > 0
    ids, texts = world.IDS[[5, 1, 5]], ["make it red", "in blue", "in green please"]
    (gallery,) = pictures.online.galleries
    queries = Composer(output, pictures.embeddings, gallery).queries(ids, texts, batch_size=2)
    model = load_cir(output)
    images = AugmentedViews(pictures.online, ids).take(ids, np.zeros(3, int))
    with torch.no_grad():
        expected = model.compose(torch.from_numpy(images), model.tokenize(texts)).numpy()
    np.testing.assert_allclose(queries, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, rtol=1e-5)


def test_a_trained_model_is_evaluated_on_cached_features(pictures: Features, tmp_path: Path) -> None:
    training = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "bf16"}
    model = train(tmp_path, pictures, world.blip_variant(training=training))
    assert pictures.online is not None
    (gallery,) = pictures.online.galleries
    queries = world.triplets(tmp_path / "queries", world.triplet_rows(20, 2))
    output, config = Output(str(tmp_path / "evaluation")), EvaluateConfig(resamples=100)
    models = {"blip.s0": model}
    benchmark = triplets.load(queries, gallery, None, config)
    evaluate(output, benchmark, pictures.embeddings, gallery, models, None, config, ActorResources(), Monitor())
    found = output.read_json("metrics.json")["blip"]
    assert 0 <= found["R@1"]["mean"] <= found["R@10"]["mean"] <= 100
    rows = queries.read_parts(tables.TRIPLETS)
    references, texts = rows["reference_id"].to_numpy(), [deltas[0] for deltas in rows["deltas"].to_pylist()]
    composed = Composer(model, pictures.embeddings, gallery).queries(references, texts, 256)
    values = pictures.open_plain(world.IDS).take(np.sort(world.IDS), np.zeros(world.COUNT, int))[:, 0]
    scores = composed @ (values / np.linalg.norm(values, axis=1, keepdims=True)).T
    scores[np.sort(world.IDS)[None] == references[:, None]] = -np.inf
    ranking = output.read_table("rankings/blip.s0.parquet", RANKINGS)
    assert [row[0] for row in ranking["image_ids"].to_pylist()] == np.sort(world.IDS)[scores.argmax(1)].tolist()


def test_weights_without_a_tokeniser_are_named(pictures: Features, tiny_blip: TowerConfig, tmp_path: Path) -> None:
    assert tiny_blip.weights is not None
    assert pictures.online is not None
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(Path(tiny_blip.weights.location()) / name, tmp_path / name)
    tower = tiny_blip.model_copy(update={"weights": Weights(folder=str(tmp_path))})
    features = replace(pictures, online=replace(pictures.online, tower=tower))
    with pytest.raises(UserError, match="has no tokenizer"):
        train(tmp_path, features, world.blip_variant())
