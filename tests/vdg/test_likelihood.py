"""Texts that others wrote, read by a generator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.features import read_mean
from tests.stages import centred_by_own, given, running, seen
from tests.vdg.stages import untrained
from vdg.backbones import build, load_generator, make_inputs
from vdg.backbones.base import IGNORED
from vdg.config import GenerateConfig, VdgConfig
from vdg.description import describe
from vdg.likelihood import Likelihood


@pytest.fixture(params=["features", "chooser"])
def model(
    request: pytest.FixtureRequest,
    embeddings: Output,
    vdg: Callable[..., VdgConfig],
    tiny_bert: dict[str, Any],
    tmp_path: Path,
) -> Output:
    """A generator as `instruct` leaves it, untrained."""
    output, chooser = Output(str(tmp_path / "model")), {"backbone": "chooser", "text": tiny_bert, "hidden": 16}
    config = VdgConfig.model_validate(chooser) if request.param == "chooser" else vdg()
    return untrained(output, describe("instruct", centred_by_own(embeddings), config, ["in red", "in blue"]), embeddings)


def read(output: Output, embeddings: Output, triplets: Output, model: Output, monitor: Monitor) -> dict[int, float]:
    generator: Any = given(model)
    stage = Likelihood(
        name="vdg",
        triplets=given(triplets),
        vdg=generator,
        **seen(centred_by_own(embeddings)),
        batch_size=5,
        precision="fp32",
        resources=ActorResources(),
    )
    stage.work(output, running(monitor))
    scores = output.read_parts(tables.SCORES)
    assert set(scores["scorer"].to_pylist()) == {tables.LIKELIHOOD}
    return dict(zip(scores["triplet_id"].to_pylist(), scores["value"].to_pylist(), strict=True))


@pytest.mark.usefixtures("ray_session")
def test_every_triplet_is_read_once_whatever_stands_beside_it(
    model: Output, embeddings: Output, triplets: Output, tmp_path: Path, monitor: Monitor
) -> None:
    found = read(Output(str(tmp_path / "out")), embeddings, triplets, model, monitor)
    rows = triplets.read_parts(tables.TRIPLETS).to_pylist()
    assert list(found) == [row["triplet_id"] for row in rows]
    assert max(found.values()) <= 1e-5
    texts = [row["deltas"][0] for row in rows]  # none of which the chooser was trained on
    (module, inputs), source = load_generator(model, texts=texts), centred_by_own(embeddings).open_plain(np.arange(12))
    for row, text in zip(rows, texts, strict=True):
        images = (source.take(np.array([row[role]]), np.zeros(1, np.int64)) for role in ("reference_id", "target_id"))
        assert found[row["triplet_id"]] == pytest.approx(module.log_likelihood(inputs.pairs(*images, [text]))[0], abs=1e-3)


def test_a_missing_image_is_named_before_an_actor_starts(
    model: Output, embeddings: Output, tmp_path: Path, monitor: Monitor
) -> None:
    triplets = Output(str(tmp_path / "strange"))
    row = {"triplet_id": 1, "reference_id": 99, "target_id": 0, "deltas": ["in red"], "source": "candidate"}
    triplets.write_table("part-00000.parquet", pa.Table.from_pylist([row], tables.TRIPLETS), tables.TRIPLETS)
    with pytest.raises(UserError, match="99"):
        read(Output(str(tmp_path / "out")), embeddings, triplets, model, monitor)


def test_a_language_models_likelihood_is_the_sum_over_its_tokens(embeddings: Output, vdg: Callable[..., VdgConfig]) -> None:
    description = describe("instruct", centred_by_own(embeddings), vdg())
    torch.manual_seed(0)
    module, inputs = build(description).eval(), make_inputs(description, read_mean(embeddings))
    images = np.random.default_rng(0).normal(size=(2, 2, 2, 8)).astype(np.float32)
    texts = ["now red", "a much longer text of many words"]
    together = module.log_likelihood(inputs.pairs(*images, texts))
    for row, text in enumerate(texts):
        alone = inputs.pairs(*images[:, row : row + 1], [text])
        tokens = int((alone["targets"] != IGNORED).sum())
        assert together[row] == pytest.approx(-tokens * float(module(alone)["loss"]), rel=1e-4)


def test_the_choosers_likelihood_is_that_of_the_text_it_wrote(
    embeddings: Output, tiny_bert: dict[str, Any], tmp_path: Path
) -> None:
    config = VdgConfig.model_validate({"backbone": "chooser", "text": tiny_bert, "hidden": 16})
    description = describe("instruct", centred_by_own(embeddings), config, ["in red", "in blue"])
    module, inputs = load_generator(untrained(Output(str(tmp_path / "chooser")), description, embeddings))
    images = np.random.default_rng(0).normal(size=(2, 5, 2, 8)).astype(np.float32)
    texts, scores = module.generate(inputs.pairs(*images), GenerateConfig(greedy=True), 0)
    assert module.log_likelihood(inputs.pairs(*images, texts)) == pytest.approx(scores, abs=1e-5)
