"""The chooser: its equations, what it learns, and that it comes back as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load
from torch.nn import functional

from cluster.artifacts import Output
from cluster.config import TrainingConfig, WorkerResources
from cluster.training.checkpoints import WEIGHTS
from mining import tables
from mining.features import read_mean
from mining.texts import encode_texts, load_text_encoder
from tests.stages import centred_by_own
from tests.vdg.conftest import IMAGES
from tests.vdg.stages import instruct
from vdg.backbones import build, load_generator, make_inputs
from vdg.backbones.chooser import ChooserBackbone
from vdg.config import GenerateConfig, InstructConfig, VdgConfig
from vdg.description import Description, describe, read_description
from vdg.export import export_generator
from vdg.generate import Generation, PartGenerator

GREEDY = GenerateConfig(greedy=True, precision="fp32")
PART = "part-00000.parquet"


@pytest.fixture
def config(tiny_bert: dict[str, Any]) -> VdgConfig:
    return VdgConfig.model_validate({"backbone": "chooser", "text": tiny_bert, "hidden": 16})


@pytest.fixture
def description(config: VdgConfig, embeddings: Output, triplets: Output) -> Description:
    deltas = [text for row in triplets.read_parts(tables.TRIPLETS)["deltas"].to_pylist() for text in row]
    return describe("instruct", centred_by_own(embeddings), config, deltas)


@pytest.fixture
def trained(config: VdgConfig, embeddings: Output, triplets: Output, tmp_path: Path, monitor: Any) -> Output:
    """By the real engine, with triplets held out."""
    training = TrainingConfig(steps=200, batch_size=8, learning_rate=1e-2)
    model, features = Output(str(tmp_path / "model")), centred_by_own(embeddings)
    how = InstructConfig(training=training, held_out=0.2)
    instruct(model, features, triplets, None, config, how, 0, WorkerResources(workers=0), monitor)
    return model


def test_texts_are_the_distinct_labelled_deltas(description: Description, triplets: Output) -> None:
    labelled = {text for row in triplets.read_parts(tables.TRIPLETS)["deltas"].to_pylist() for text in row}
    assert set(description.texts) == labelled
    assert len(description.texts) == len(labelled)


def test_loss_and_scores_equal_their_equations(description: Description, embeddings: Output) -> None:
    torch.manual_seed(0)
    module = build(description).eval()
    assert isinstance(module, ChooserBackbone)
    assert description.vdg.text is not None
    inputs = make_inputs(description, read_mean(embeddings))
    images = np.random.default_rng(0).normal(size=(2, 5, 2, 8)).astype(np.float32)
    batch = inputs.pairs(*images, [description.texts[place] for place in range(5)])
    r, t = (functional.normalize(torch.from_numpy(x.mean(1) - read_mean(embeddings)), dim=-1) for x in images)
    units = module.reference(r), module.target(t), module.target(t - r)
    vectors = functional.normalize(encode_texts(load_text_encoder(description.vdg.text), description.texts, "cpu"), dim=-1)
    meant = functional.normalize(module.projection(functional.gelu(4 * torch.cat(units, 1))), dim=-1)
    likely = (np.exp(2.9) * meant @ vectors.T).log_softmax(1)
    alike = (20 * (vectors @ vectors.T - 1)).exp()
    shared = alike[:5] / alike[:5].sum(1, keepdim=True)
    torch.testing.assert_close(module(batch)["loss"], -(shared * likely).sum(1).mean())
    texts, scores = module.generate(inputs.pairs(*images), GREEDY, 0)
    best = likely.argmax(1)
    assert texts == [description.texts[place] for place in best.tolist()]
    assert scores == pytest.approx((likely.exp() * alike[best]).sum(1).log().tolist(), abs=1e-4)


def test_samples_follow_from_the_seed(description: Description, embeddings: Output) -> None:
    torch.manual_seed(0)
    module, inputs = build(description).eval(), make_inputs(description, read_mean(embeddings))
    images = np.random.default_rng(0).normal(size=(2, 40, 2, 8)).astype(np.float32)
    sampled = GenerateConfig(temperature=2.0)
    first, again, other = (module.generate(inputs.pairs(*images), sampled, seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    likeliest = GenerateConfig(temperature=2.0, top_k=1)
    assert module.generate(inputs.pairs(*images), likeliest, 1) == module.generate(inputs.pairs(*images), GREEDY, 0)


@pytest.mark.usefixtures("ray_session")
def test_it_learns_and_comes_back_as_it_was(trained: Output, embeddings: Output, triplets: Output) -> None:
    table, (module, inputs) = triplets.read_parts(tables.TRIPLETS), load_generator(trained)
    fresh = build(read_description(trained))
    assert load(trained.read_bytes(WEIGHTS)).keys() == dict(fresh.named_parameters()).keys()
    source = centred_by_own(embeddings).open_plain(np.arange(IMAGES))
    images = [source.take(table[name].to_numpy(), np.zeros(24, int)) for name in ("reference_id", "target_id")]
    texts, scores = module.generate(inputs.pairs(*images), GREEDY, 0)
    right = [text in deltas for text, deltas in zip(texts, table["deltas"].to_pylist(), strict=True)]
    assert np.mean(right) > 0.6
    assert max(scores) <= 0


@pytest.mark.usefixtures("ray_session")
def test_it_writes_pseudo_triplets(trained: Output, embeddings: Output, pairs: Output, tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    config = GenerateConfig(samples=3, views=True, batch_size=4)
    PartGenerator(Generation(output, centred_by_own(embeddings), pairs, trained, config, 0), 1)({"part": np.array([PART])})
    written = output.read_table(PART, tables.TRIPLETS)["deltas"].to_pylist()
    assert len(written) == 7
    assert {text for deltas in written for text in deltas} <= set(read_description(trained).texts)


@pytest.mark.usefixtures("ray_session")
def test_an_export_holds_all_that_builds_it_again(trained: Output, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    notes = export_generator(trained, folder)
    images = np.random.default_rng(0).normal(size=(2, 5, 2, 8)).astype(np.float32)
    loaded = map(load_generator, (trained, Output(str(folder))))
    answers = [module.generate(inputs.pairs(*images), GREEDY, 0) for module, inputs in loaded]
    assert answers[0] == answers[1]
    assert "needs this package" in notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "text: backbone 'chooser' needs it"),
        ({"language_model": {"hub": "a/b"}}, "language_model: backbone 'chooser' has none"),
        ({"backbone": "features"}, "language_model: backbone 'features' needs it"),
        ({"backbone": "features", "language_model": {"hub": "a/b"}}, "text: backbone 'features' has none"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused(config: VdgConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VdgConfig.model_validate({**config.model_dump(), **changes})


def test_its_text_encoder_is_frozen(config: VdgConfig, tiny_bert: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"text\.trained"):
        VdgConfig.model_validate({**config.model_dump(), "text": {**tiny_bert, "trained": True}})
