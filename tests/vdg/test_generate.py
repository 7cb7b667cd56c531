"""Pairs to pseudo triplets on Ray Data actors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.training import WEIGHTS
from mining import tables
from mining.features import Features, copy_mean, read_mean
from vdg.config import DESCRIPTION, Description, GenerateConfig
from vdg.data import prepare
from vdg.generate import Generation, PartGenerator, generate
from vdg.model import VisualDeltaGenerator, load_vdg

TOKENS, DIM = 2, 8  # of the `embeddings` fixture

CONFIG = GenerateConfig(batch_size=3, temperature=2.0, max_new_tokens=7)
PARTS = ["part-00000.parquet", "part-00001.parquet"]


@pytest.fixture
def model(embeddings, vdg, tmp_path: Path) -> Output:
    """A generator as `instruct` leaves it, untrained."""
    output = Output(str(tmp_path / "model"))
    description = Description(stage="instruct", tokens=TOKENS, dim=DIM, vdg=vdg())
    output.write_json(DESCRIPTION, description.model_dump(mode="json"))
    copy_mean(embeddings, output)
    torch.manual_seed(0)
    module = VisualDeltaGenerator(vdg(), DIM, "instruct")
    output.write_bytes(WEIGHTS, save({name: p.detach() for name, p in module.named_parameters() if p.requires_grad}))
    return output


@pytest.fixture
def run(tmp_path: Path, embeddings: Output, pairs: Output, model: Output, monitor: Monitor) -> Callable[[], Output]:
    """Runs the stage, always into one folder."""

    def run_stage() -> Output:
        output = Output(str(tmp_path / "pseudo"))
        generate(output, embeddings, pairs, model, CONFIG, 0, ActorResources(), monitor)
        return output

    return run_stage


@pytest.mark.usefixtures("ray_session")
def test_each_pair_gets_a_delta_and_a_score(run, pairs):
    output = run()
    assert output.parts() == PARTS
    for part in PARTS:
        asked, made = pairs.read_table(part, tables.PAIRS), output.read_table(part, tables.TRIPLETS)
        scores = output.read_table(f"scores/{part}", tables.SCORES)
        rejected = {int(key) for key in output.rejects()["key"].to_pylist()}
        carried = ["pair_id", "group_id", "reference_id", "target_id"]
        kept = [row for row in asked.select(carried).to_pylist() if row["pair_id"] not in rejected]
        assert made.select(carried).to_pylist() == kept
        assert all(len(deltas) == 1 and deltas[0] for deltas in made["deltas"].to_pylist())
        assert scores["triplet_id"].to_pylist() == made["triplet_id"].to_pylist()
        assert all(value < 0 for value in scores["value"].to_pylist())
    tables.check_unique(output.read_parts(tables.TRIPLETS)["triplet_id"].to_pylist(), "pseudo")


@pytest.mark.usefixtures("ray_session")
def test_a_second_run_makes_only_what_is_missing_and_makes_it_the_same(run, monitor):
    output = run()
    first = {part: output.read_bytes(part) for part in PARTS}
    kept, lost = (Path(output.path(part)) for part in PARTS)
    before = kept.stat().st_mtime_ns
    lost.unlink()
    assert run().read_bytes(PARTS[1]) == first[PARTS[1]]
    assert kept.stat().st_mtime_ns == before
    assert (monitor.total, monitor.resumed) == (14, 7)


def test_another_seed_makes_other_deltas(embeddings, pairs, model, tmp_path):
    outputs = [Output(str(tmp_path / str(seed))) for seed in range(2)]
    for seed, output in enumerate(outputs):
        PartGenerator(Generation(output, embeddings, pairs, model, CONFIG, seed), 1)({"part": np.array(PARTS[:1])})
    assert outputs[0].read_bytes(PARTS[0]) != outputs[1].read_bytes(PARTS[0])


def test_the_models_own_mean_centres_another_gallery(embeddings, pairs, model, tmp_path):
    job = Generation(Output(str(tmp_path / "out")), embeddings, pairs, model, CONFIG.model_copy(update={"greedy": True}), 0)
    mean = read_mean(model)
    from safetensors.numpy import save as save_arrays

    embeddings.write_bytes("mean.safetensors", save_arrays({"mean": mean + 5}))
    actor = PartGenerator(job, 1)
    actor({"part": np.array(PARTS[:1])})
    asked = pairs.read_table(PARTS[0], tables.PAIRS)
    source = Features(embeddings).open(np.arange(12))
    images = [source.take(asked[name].to_numpy(), np.zeros(7, int)) for name in ("reference_id", "target_id")]
    expected = load_vdg(model, dtype=actor.generator.projection.weight.dtype).generate(
        *(prepare(values, mean, actor.generator.config) for values in images), job.config, 0
    )
    made = job.output.read_table(PARTS[0], tables.TRIPLETS)["deltas"].to_pylist()
    assert [deltas[0] for deltas in made] == [text for text in expected[0] if text]


def test_an_empty_delta_is_rejected(embeddings, pairs, model, tmp_path):
    output = Output(str(tmp_path / "out"))
    actor = PartGenerator(Generation(output, embeddings, pairs, model, CONFIG, 0), 1)
    actor.generator.generate = lambda reference, *_: (["red"] * (len(reference) - 1) + [""], [-1.0] * len(reference))
    assert actor({"part": np.array(PARTS[:1])}) == {"part": PARTS[:1], "rows": [7]}
    assert len(output.read_table(PARTS[0], tables.TRIPLETS)) == len(output.read_table(f"scores/{PARTS[0]}", tables.SCORES)) == 4
    assert output.rejects()["key"].to_pylist() == ["2", "5", "6"]
    assert set(output.rejects()["reason"].to_pylist()) == {"empty_delta"}


def test_a_model_without_description_is_refused_before_an_actor_starts(embeddings, pairs, tmp_path, monitor):
    with pytest.raises(UserError, match=r"vdg\.json"):
        generate(
            Output(str(tmp_path / "o")), embeddings, pairs, Output(str(tmp_path / "x")), CONFIG, 0, ActorResources(), monitor
        )
