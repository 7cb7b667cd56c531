"""Pairs to pseudo triplets on Ray Data actors."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import save as save_arrays

from cluster.artifacts import WARNINGS, Output
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.features import read_mean
from tests.chaos.killing import assert_same_table, killing
from tests.stages import centred_by_own
from tests.vdg.stages import generate, untrained
from vdg.agreement import medoid
from vdg.backbones import load_generator
from vdg.config import GenerateConfig
from vdg.description import describe
from vdg.generate import GARBLED, Generation, PartGenerator, _flag

CONFIG = GenerateConfig(batch_size=3, temperature=2.0, max_new_tokens=7)
PARTS = ["part-00000.parquet", "part-00001.parquet"]


@pytest.fixture
def model(embeddings, vdg, tmp_path: Path) -> Output:
    """A generator as `instruct` leaves it, untrained."""
    description = describe("instruct", centred_by_own(embeddings), vdg())
    return untrained(Output(str(tmp_path / "model")), description, embeddings)


@pytest.fixture
def run(tmp_path: Path, embeddings: Output, pairs: Output, model: Output, monitor: Monitor) -> Callable[[], Output]:
    """Runs the stage, always into one folder."""

    def run_stage() -> Output:
        output = Output(str(tmp_path / "pseudo"))
        generate(output, centred_by_own(embeddings), pairs, model, CONFIG, 0, ActorResources(), monitor)
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


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_the_deltas_are_the_same(embeddings, pairs, model, tmp_path, monitor):
    table = pairs.read_parts(tables.PAIRS)
    small, whole, broken = (Output(str(tmp_path / name)) for name in ("small", "whole", "broken"))
    for row in range(len(table)):  # a pair a part
        small.write_table(f"part-{row:05d}.parquet", table.slice(row, 1), tables.PAIRS)

    def write(output: Output) -> None:
        config = CONFIG.model_copy(update={"max_new_tokens": 24})
        generate(output, centred_by_own(embeddings), small, model, config, 0, ActorResources(), monitor)

    write(whole)
    with killing("PartGenerator", lambda: len(broken.parts()) > 2):
        write(broken)
    assert_same_table(broken, whole, tables.TRIPLETS, "triplet_id")


def test_another_seed_makes_other_deltas(embeddings, pairs, model, tmp_path):
    outputs = [Output(str(tmp_path / str(seed))) for seed in range(2)]
    for seed, output in enumerate(outputs):
        PartGenerator(Generation(output, centred_by_own(embeddings), pairs, model, CONFIG, seed), 1)(
            {"part": np.array(PARTS[:1])}
        )
    assert outputs[0].read_bytes(PARTS[0]) != outputs[1].read_bytes(PARTS[0])


def _job(output: Output, embeddings: Output, pairs: Output, model: Output, **fields: Any) -> Generation:
    return Generation(output, centred_by_own(embeddings), pairs, model, CONFIG.model_copy(update=fields), 0)


def test_the_models_own_mean_centres_another_gallery(embeddings, pairs, model, tmp_path):
    job = _job(Output(str(tmp_path / "out")), embeddings, pairs, model, greedy=True)
    embeddings.write_bytes("mean.safetensors", save_arrays({"mean": read_mean(model) + 5}))
    actor = PartGenerator(job, 1)
    actor({"part": np.array(PARTS[:1])})
    asked = pairs.read_table(PARTS[0], tables.PAIRS)
    source = centred_by_own(embeddings).open(np.arange(12))
    images = [source.take(asked[name].to_numpy(), np.zeros(7, int)) for name in ("reference_id", "target_id")]
    generator, inputs = load_generator(model, actor.job.config.precision)
    texts, _ = generator.generate(inputs.pairs(*images), job.config, 0)
    made = job.output.read_table(PARTS[0], tables.TRIPLETS)["deltas"].to_pylist()
    assert [deltas[0] for deltas in made] == [text for text in texts if text]


def test_an_empty_delta_is_rejected(embeddings, pairs, model, tmp_path):
    output = Output(str(tmp_path / "out"))
    actor = PartGenerator(Generation(output, centred_by_own(embeddings), pairs, model, CONFIG, 0), 1)
    actor.generator.generate = lambda batch, *_: (["red"] * (len(batch["ids"]) - 1) + [""], [-1.0] * len(batch["ids"]))
    assert actor({"part": np.array(PARTS[:1])}) == {"part": PARTS[:1], "rows": [7]}
    assert len(output.read_table(PARTS[0], tables.TRIPLETS)) == len(output.read_table(f"scores/{PARTS[0]}", tables.SCORES)) == 4
    assert output.rejects()["key"].to_pylist() == ["2", "5", "6"]
    assert set(output.rejects()["reason"].to_pylist()) == {"empty_delta"}


def test_garbled_deltas_are_counted(tmp_path):
    output, row = Output(str(tmp_path / "out")), dict.fromkeys(tables.TRIPLETS.names, 1) | {"source": "vdg"}
    rows = [{**row, "deltas": [text]} for text in ("is red", "red \ufffd", "is blue")]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    _flag(output, [])
    assert output.read_json(GARBLED) == {"deltas": 3, "garbled": 1, "most_frequent": 1}
    assert output.read_json(WARNINGS) == ["1 of 3 deltas are garbled or repeat themselves, such as 'red \ufffd'"]


@pytest.mark.parametrize(
    ("texts", "said", "stops"),
    [
        ([f"is red {i}" for i in range(30)], [], False),
        (["is red"] * 16 + [f"is {i}" for i in range(14)], ["16 of 30 deltas are the same: 'is red'"], False),
        (["is red"] * 30, ["30 of 30 deltas are the same: 'is red'"], True),
        (
            [f"red \ufffd {i}" for i in range(30)],
            ["30 of 30 deltas are garbled or repeat themselves, such as 'red \ufffd 0'"],
            True,
        ),
        (["is red"] * 5, [], False),
    ],
)
def test_a_generator_that_learned_nothing_is_flagged_or_stopped(tmp_path, texts, said, stops):
    output, row = Output(str(tmp_path / "out")), dict.fromkeys(tables.TRIPLETS.names, 1) | {"source": "vdg"}
    rows = [{**row, "deltas": [text]} for text in texts]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    _flag(output, [])
    with pytest.raises(UserError, match=r"has learned nothing: .*the loss did not fall") if stops else nullcontext():
        _flag(output, ["the loss did not fall: 3.1 at step 10, 3.2 at step 90"])
    assert output.read_json(WARNINGS) == said


def _scores(output: Output, scorer: str) -> dict[int, float]:
    table = output.read_table(f"scores/{PARTS[0]}", tables.SCORES).to_pylist()
    return {row["triplet_id"]: row["value"] for row in table if row["scorer"] == scorer}


def _watched(actor: PartGenerator) -> list[tuple[list[str], list[float], bool, torch.Tensor]]:
    """What each call of the actor's generator gives: texts, scores, whether greedy, and the features it saw."""
    calls, decode = [], actor.generator.generate

    def watch(batch, config, seed):
        texts, scores = decode(batch, config, seed)
        calls.append((texts, scores, config.greedy, batch["features"]))
        return texts, scores

    actor.generator.generate = watch
    return calls


@pytest.mark.parametrize("greedy", [True, False])
def test_of_several_samples_the_one_is_kept_that_agrees_best(greedy, embeddings, pairs, model, tmp_path):
    output = Output(str(tmp_path / "out"))
    fields = {"samples": 3, "greedy": greedy, "batch_size": 7, "temperature": 0.7}
    actor = PartGenerator(_job(output, embeddings, pairs, model, **fields), 1)
    calls = _watched(actor)
    actor({"part": np.array(PARTS[:1])})
    assert [greedily for *_, greedily, _ in calls] == [True] * greedy + [False] * 3
    assert all(torch.equal(features, calls[0][3]) for *_, features in calls)
    made = output.read_table(PARTS[0], tables.TRIPLETS).to_pylist()
    means, agreements = _scores(output, tables.SCORER), _scores(output, tables.AGREEMENT)
    assert means.keys() == agreements.keys() == {row["triplet_id"] for row in made}
    for row in made:
        place = row["reference_id"]  # of the pair in its part
        texts = [call[0][place] for call in calls]
        kept, agreement = medoid(texts)
        assert row["deltas"] == [texts[kept]]
        assert agreements[row["triplet_id"]] == pytest.approx(agreement)
        assert means[row["triplet_id"]] == pytest.approx(calls[kept][1][place])


def test_samples_see_the_cached_views_in_turn(embeddings, pairs, model, tmp_path):
    fields = {"samples": 3, "views": True, "batch_size": 7}
    actor = PartGenerator(_job(Output(str(tmp_path / "out")), embeddings, pairs, model, **fields), 1)
    calls = _watched(actor)
    actor({"part": np.array(PARTS[:1])})
    source = centred_by_own(embeddings).open(np.arange(12))
    asked = pairs.read_table(PARTS[0], tables.PAIRS)
    for (*_, seen), view in zip(calls, (0, 1, 0), strict=True):
        images = [source.take(asked[name].to_numpy(), np.full(7, view)) for name in ("reference_id", "target_id")]
        assert torch.equal(seen, actor.inputs.pairs(*images)["features"])


@pytest.mark.parametrize("drop", [True, False])
def test_a_delta_that_says_no_change_is_rejected_where_asked(drop, embeddings, pairs, model, tmp_path):
    output = Output(str(tmp_path / "out"))
    actor = PartGenerator(_job(output, embeddings, pairs, model, drop_no_change=drop, batch_size=7), 1)
    actor.generator.generate = lambda *_: (["red", "no change", *["green"] * 5], [-1.0] * 7)
    actor({"part": np.array(PARTS[:1])})
    rejects = [(row["key"], row["reason"]) for row in output.rejects().to_pylist()]
    assert rejects == ([("1", "no_change")] if drop else [])
    assert len(output.read_table(PARTS[0], tables.TRIPLETS)) == (6 if drop else 7)


def test_views_need_samples():
    with pytest.raises(ValueError, match="set samples above 1"):
        GenerateConfig(views=True)


def test_a_model_without_description_is_refused_before_an_actor_starts(embeddings, pairs, tmp_path, monitor):
    with pytest.raises(UserError, match=r"vdg\.json"):
        generate(
            Output(str(tmp_path / "o")),
            centred_by_own(embeddings),
            pairs,
            Output(str(tmp_path / "x")),
            CONFIG,
            0,
            ActorResources(),
            monitor,
        )
