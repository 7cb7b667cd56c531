"""What is found for a reference and a text is what evaluate ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cir import search
from cir.compose import Composer, target_side
from cir.metrics import rank, unit
from cir.search import Matrix, Searcher
from cir.vectors import Embedded
from cluster.artifacts import Output
from cluster.config import WorkerResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining.images import decode
from mining.search import Exact, Lists
from tests.cir import world
from tests.cir.stages import train_cir

QUERIES = world.triplet_rows(40, 2)
TOP = 10


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory, tiny_bert: dict[str, Any], tower: Any) -> Searcher:
    """Two variants that centre and one that does not."""
    folder = tmp_path_factory.mktemp("search")
    features = world.features(folder / "embeddings")
    triplets = world.triplets(folder / "labelled", world.triplet_rows(60, 0))
    variants = {
        "long": world.variant(tiny_bert),
        "short": world.variant(tiny_bert, training={"steps": 3, "batch_size": 16, "learning_rate": 3e-3}),
        "raw": world.variant(tiny_bert, center=False),
    }
    models = {}
    for name, variant in variants.items():
        models[f"{name}.s0"] = model = Output(str(folder / name))
        train_cir(model, features, triplets, None, variant, 0, WorkerResources(workers=0), Monitor())
    return Searcher(models, features.embeddings, world.gallery(folder / "gallery"), tower)


def evaluated(searcher: Searcher, name: str) -> np.ndarray:
    """As `evaluate` ranks: ids [queries, TOP]."""
    references = np.array([row["reference_id"] for row in QUERIES])
    queries = Composer(searcher.models[name], searcher.embeddings, searcher.gallery).queries(
        references, [row["deltas"][0] for row in QUERIES], 16
    )
    prepare = target_side(searcher.models[name])
    blocks = ((ids, prepare(values)) for ids, values in Embedded(searcher.embeddings).blocks())
    return rank(queries, blocks, references, references, queries, TOP).image_ids


@pytest.mark.parametrize("name", ["long.s0", "short.s0", "raw.s0"])
def test_every_query_of_every_model_is_ranked_as_evaluate_ranks_it(searcher: Searcher, name: str) -> None:
    for row, expected in zip(QUERIES, evaluated(searcher, name), strict=True):
        hits = searcher.search(name, searcher.known(row["reference_id"]), row["deltas"][0], TOP)
        assert hits.image_ids.tolist() == expected.tolist()
        assert (np.diff(hits.scores) <= 0).all()


def test_models_of_one_mean_share_a_matrix(searcher: Searcher) -> None:
    assert searcher.matrix("long.s0") is searcher.matrix("short.s0")
    assert searcher.matrix("long.s0") is not searcher.matrix("raw.s0")


def test_the_reference_is_found_when_it_is_kept(searcher: Searcher) -> None:
    reference = searcher.known(int(world.IDS[3]))
    hits = searcher.search("long.s0", reference, "the same", world.COUNT + 5, remove_reference=False)
    assert set(hits.image_ids.tolist()) == set(world.IDS.tolist())
    assert len(searcher.search("long.s0", reference, "the same", world.COUNT + 5).image_ids) == world.COUNT - 1


def test_keys_and_ids_name_each_other(searcher: Searcher) -> None:
    assert searcher.image_id("image5") == world.IDS[5]
    assert searcher.keys(world.IDS[[5, 0]]) == ["image5", "image0"]
    with pytest.raises(UserError, match=r"imageX: no image of the gallery"):
        searcher.image_id("imageX")
    with pytest.raises(UserError, match=r"model best.s0: there is none of this name; give one of long.s0"):
        searcher.composer("best.s0")
    with pytest.raises(KeyError):
        searcher.known(5)


def test_inverted_lists_find_what_an_exact_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32))
    ids = np.arange(3000) * 7
    exact = Matrix(ids, vectors)
    monkeypatch.setattr(search, "EXACT_PHOTOS", 100)
    monkeypatch.setattr(search, "LISTS_A_SEARCHED", 1)
    lists = Matrix(ids, vectors)
    assert (type(exact.search), type(lists.search)) == (Exact, Lists)
    for query in vectors[:20]:
        assert lists.nearest(query, 5, None).image_ids.tolist() == exact.nearest(query, 5, None).image_ids.tolist()
        assert np.allclose(lists.nearest(query, 5, 0).scores, exact.nearest(query, 5, 0).scores, atol=1e-5)


def test_an_uploaded_copy_of_a_photo_of_the_gallery_is_that_photo(
    tmp_path: Path, photos: list[tuple[str, bytes]], tiny_bert: dict[str, Any], ray_session: None
) -> None:
    features = world.photo_features(tmp_path, photos[:24], views=1)
    gallery = features.online.galleries[0]  # type: ignore[union-attr]
    searcher = Searcher({}, features.embeddings, gallery, features.online.tower)  # type: ignore[union-attr]
    _, content = photos[3]
    image_id = world.photo_ids(photos)[3]
    uploaded = searcher.uploaded(content, searcher.encoder.pixels(decode(content)))
    assert np.allclose(uploaded.vector, searcher.known(image_id).vector, atol=2e-2)
    assert uploaded.image_id is None  # the builder's gallery holds no hashes


def test_the_lists_are_trained_once_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(search, "EXACT_PHOTOS", 100)
    vectors = unit(np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32))
    first = Matrix(np.arange(500), vectors).nearest(vectors[3], 5, None)
    monkeypatch.delattr(search, "trained")
    again = Matrix(np.arange(500), vectors).nearest(vectors[3], 5, None)
    assert again.image_ids.tolist() == first.image_ids.tolist()
