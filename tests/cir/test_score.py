"""The round-trip score."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cir.compose import Composer, target_side
from cir.config import ScoreConfig
from cir.score import Scoring
from cluster.artifacts import Output
from cluster.config import ActorResources, WorkerResources
from cluster.monitor import Monitor
from mining import tables
from mining.features import Features
from tests.cir import world
from tests.cir.stages import score_round_trip, train_cir


@pytest.fixture(scope="module")
def judged(ray_session: None, tmp_path_factory: pytest.TempPathFactory, tiny_bert: dict[str, Any]) -> Scoring:
    """A model that learned colours, and pseudo triplets of which the odd ones say a wrong colour."""
    folder = tmp_path_factory.mktemp("score")
    features, model = world.features(folder / "embeddings"), Output(str(folder / "model"))
    labelled = world.triplets(folder / "labelled", world.triplet_rows(60, 0))
    training = {"steps": 60, "batch_size": 32, "learning_rate": 3e-3}
    config = world.variant(tiny_bert, training=training)
    train_cir(model, features, labelled, None, config, 0, WorkerResources(workers=0), Monitor())
    rows = world.triplet_rows(40, 1)
    for row, other in zip(rows[1::2], world.COLOURS * 4, strict=False):
        row["deltas"] = [f"make it {other}"]
    pseudo = world.triplets(folder / "pseudo", rows)
    return Scoring(Output(str(folder / "all")), pseudo, model, features.embeddings, pseudo, ScoreConfig(), 0)


def scores(job: Scoring) -> np.ndarray:
    score_round_trip(job, ActorResources(), Monitor())
    table = job.output.read_parts(tables.SCORES)
    assert table["triplet_id"].to_pylist() == job.pseudo.read_parts(tables.TRIPLETS)["triplet_id"].to_pylist()
    assert set(table["scorer"].to_pylist()) == {tables.ROUND_TRIP}
    return table["value"].to_numpy()


def test_a_right_delta_leads_back_to_its_target(judged: Scoring) -> None:
    found = scores(judged)
    assert (found <= 0).all()
    assert np.median(found[::2]) > np.median(found[1::2]) + 0.5


def test_the_rank_is_that_of_the_whole_gallery_without_the_reference(judged: Scoring) -> None:
    rows = judged.pseudo.read_parts(tables.TRIPLETS)
    references, targets = rows["reference_id"].to_numpy(), rows["target_id"].to_numpy()
    texts = [deltas[0] for deltas in rows["deltas"].to_pylist()]
    queries = Composer(judged.model, judged.embeddings, judged.gallery).queries(references, texts, 7)
    source, prepare = Features(judged.embeddings).open_plain(world.IDS), target_side(judged.model)
    values = prepare(source.take(world.IDS, np.zeros(world.COUNT, int))[:, 0])
    cosines = queries @ (values / np.linalg.norm(values, axis=1, keepdims=True)).T
    own = cosines[np.arange(len(targets)), [world.IDS.tolist().index(i) for i in targets]]
    higher = (cosines > own[:, None] + 1e-6) & (world.IDS[None] != references[:, None])
    np.testing.assert_allclose(scores(judged), -np.log(1 + higher.sum(1)), atol=1e-6)


def test_a_sample_of_the_gallery_bounds_the_rank(judged: Scoring, tmp_path: Path) -> None:
    config = ScoreConfig(gallery_images=5)
    few = Scoring(Output(str(tmp_path)), judged.pseudo, judged.model, judged.embeddings, judged.gallery, config, 0)
    assert scores(few).min() >= -np.log(6) - 1e-6
