"""Alignment and instruction through the real training engine."""

import json
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load

from cluster.artifacts import Output
from cluster.config import TrainingConfig, WorkerResources
from cluster.errors import UserError
from cluster.training.checkpoints import WEIGHTS
from cluster.training.loop import METRICS, train
from mining import tables
from mining.features import read_mean
from tests.stages import centred_by_own
from tests.vdg.stages import align, instruct
from vdg.backbones import build, load_generator, make_inputs
from vdg.backbones.base import Backbone
from vdg.config import AlignConfig, GenerateConfig, InstructConfig
from vdg.description import describe
from vdg.instruct import InstructTask

TOKENS, DIM = 2, 8  # of the `embeddings` fixture

pytestmark = pytest.mark.usefixtures("ray_session")
LOCAL = WorkerResources(workers=0)
ALIGN = AlignConfig(training=TrainingConfig(steps=4, batch_size=4, learning_rate=1e-2))


def _config(held_out: float = 0.0, **fields) -> InstructConfig:
    return InstructConfig(
        training=TrainingConfig(**{"steps": 12, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 4, **fields}),
        held_out=held_out,
    )


def _losses(output: Output) -> dict[int, float]:
    lines = [json.loads(line) for line in output.read_bytes(METRICS).decode().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def test_align_then_instruct_then_generate(embeddings, captions, triplets, vdg, tmp_path, monitor):
    aligned, model = Output(str(tmp_path / "aligned")), Output(str(tmp_path / "model"))
    align(aligned, centred_by_own(embeddings), captions, vdg(), ALIGN, 0, LOCAL, monitor)
    assert set(load(aligned.read_bytes(WEIGHTS))) == {"projection.weight"}

    instruct(model, centred_by_own(embeddings), triplets, aligned, vdg(), _config(held_out=0.3), 0, LOCAL, monitor)
    weights = load(model.read_bytes(WEIGHTS))
    assert {name.split(".")[0] for name in weights} == {"projection", "language_model"}
    assert all("lora_" in name for name in weights if name != "projection.weight")
    assert model.read_bytes("mean.safetensors") == embeddings.read_bytes("mean.safetensors")
    assert "negative_val_loss" in json.loads(model.read_bytes(METRICS).decode().splitlines()[-1])

    description = describe("instruct", centred_by_own(embeddings), vdg())
    trained = build(description).eval()
    trained.load_state_dict(weights, strict=False)
    images = np.random.default_rng(0).normal(size=(2, 5, TOKENS, DIM)).astype(np.float32)
    config = GenerateConfig(greedy=True, max_new_tokens=8)
    texts, scores = trained.generate(make_inputs(description, read_mean(embeddings)).pairs(*images), config, seed=0)
    generator, inputs = load_generator(model)
    reloaded = generator.generate(inputs.pairs(*images), config, seed=0)
    assert reloaded[0] == texts
    assert reloaded[1] == pytest.approx(scores, abs=1e-4)


def _task(features, triplets, aligned, vdg, config, kind=InstructTask, **fields) -> InstructTask:
    return kind(features, triplets, aligned, describe("instruct", features, vdg), config, **fields)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_instruct_starts_from_the_aligned_projection(projection, embeddings, captions, triplets, vdg, tmp_path, monitor):
    aligned, config = Output(str(tmp_path / "aligned")), vdg(projection=projection)
    align(aligned, centred_by_own(embeddings), captions, config, ALIGN, 0, LOCAL, monitor)
    module = _task(centred_by_own(embeddings), triplets, aligned, config, _config()).build()
    found = {f"projection.{name}": value for name, value in module.projection.state_dict().items()}
    expected = load(aligned.read_bytes(WEIGHTS))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_instruction_learns(embeddings, triplets, vdg, tmp_path, monitor):
    output = Output(str(tmp_path / "model"))
    config = _config(steps=60, checkpoint_every=60)
    instruct(output, centred_by_own(embeddings), triplets, None, vdg(), config, 0, LOCAL, monitor)
    losses = _losses(output)
    assert losses[60] < 0.7 * losses[10]


def test_an_aligned_projection_that_does_not_fit_is_refused(embeddings, captions, triplets, vdg, tmp_path, monitor):
    aligned = Output(str(tmp_path / "aligned"))
    align(aligned, centred_by_own(embeddings), captions, vdg(), ALIGN, 0, LOCAL, monitor)
    for field, other in {"tokens_per_feature": 2, "projection": "mlp"}.items():
        model, changed = Output(str(tmp_path / "m")), vdg(**{field: other})
        with pytest.raises(UserError, match=field):
            instruct(model, centred_by_own(embeddings), triplets, aligned, changed, _config(), 0, LOCAL, monitor)


def test_a_folder_without_a_generator_is_refused(tmp_path):
    with pytest.raises(UserError, match="align or instruct"):
        load_generator(Output(str(tmp_path)))


@pytest.mark.workers
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(embeddings, triplets, vdg, tmp_path, monitor):
    @dataclass
    class Killed(InstructTask):
        """Dies after step 6, two steps after a checkpoint."""

        drawn: int = 0

        def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
            self.drawn += 1
            if self.drawn > 7:
                raise RuntimeError("killed")
            return super().batch(rows, rng)

    whole, resumed = Output(str(tmp_path / "whole")), Output(str(tmp_path / "resumed"))
    config, features = _config(), centred_by_own(embeddings)
    instruct(whole, features, triplets, None, vdg(), config, 0, LOCAL, monitor)
    worker = WorkerResources(workers=1, max_failures=0)
    with pytest.raises(Exception, match="killed"):
        train(resumed, _task(features, triplets, None, vdg(), config, Killed), config.training, 0, worker, monitor)
    instruct(resumed, features, triplets, None, vdg(), config, 0, worker, monitor)
    assert monitor.resumed == 4
    assert _losses(resumed) == pytest.approx(_losses(whole), rel=1e-4)
    left, right = (load(output.read_bytes(WEIGHTS)) for output in (whole, resumed))
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-4, rtol=1e-3)


@pytest.fixture
def undrawn(embeddings, tmp_path):
    """Features and triplets that leave nothing to chance: one view, one delta a triplet, all of four tokens."""
    info = embeddings.read_json("info.json")
    embeddings.write_json("info.json", {**info, "views": 1})
    output = Output(str(tmp_path / "undrawn"))
    deltas = ["".join(letters) for letters in permutations("qzj")]
    rows = [
        {"triplet_id": i, "reference_id": i % 12, "target_id": (i + 3) % 12, "deltas": [deltas[i % 6]], "source": "human"}
        for i in range(24)
    ]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    return centred_by_own(embeddings), output


@dataclass
class Watched(InstructTask):
    """Writes down how much of the frozen weights this rank holds once the model is built."""

    shares: str = ""

    def build(self) -> Backbone:
        generator = super().build()
        frozen = [p for p in generator.parameters() if not p.requires_grad]
        with open(self.shares, "a") as file:
            file.write(
                f"{sum(p.numel() for p in frozen)} {sum(p.ds_tensor.numel() for p in frozen if hasattr(p, 'ds_tensor'))}\n"
            )
        return generator


@pytest.mark.workers
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_workers_train_as_one(zero_stage, undrawn, vdg, tmp_path, monitor):
    """At stage 3 each holds half of the weights, the frozen ones too, from the moment they are loaded."""
    outputs = {name: Output(str(tmp_path / name)) for name in ("one", "two")}
    for name, output in outputs.items():
        workers = LOCAL if name == "one" else WorkerResources(workers=2, max_failures=0)
        config = _config(steps=20, checkpoint_every=10, zero_stage=zero_stage if name == "two" else 2)
        task = _task(*undrawn, None, vdg(), config, Watched, shares=str(tmp_path / f"{name}.shares"))
        train(output, task, config.training, 0, workers, monitor)
    shares = {name: [line.split() for line in (tmp_path / f"{name}.shares").read_text().splitlines()] for name in outputs}
    total = int(shares["one"][0][0])
    if zero_stage == 2:
        assert shares["two"] == [[str(total), "0"]] * 2
    else:
        assert [int(whole) for whole, _ in shares["two"]] == [0, 0]
        assert [int(part) for _, part in shares["two"]] == pytest.approx([total / 2] * 2, rel=0.01)
    expected, weights = _losses(outputs["one"]), load(outputs["one"].read_bytes(WEIGHTS))
    assert expected[20] < 0.9 * expected[10]
    assert _losses(outputs["two"]) == pytest.approx(expected, rel=1e-4)
    found = load(outputs["two"].read_bytes(WEIGHTS))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in weights.items()}
