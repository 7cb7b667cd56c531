"""FashionIQ's own files and protocols."""

from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from cir.benchmarks import fashioniq
from cir.config import Split
from cir.evaluate import RANKINGS
from tests.cir.benchmarks import official

CLEAN = "clean val, 5,768 queries"


def test_the_official_files_are_read_as_they_are() -> None:
    found = fashioniq.load(official.annotations("fashioniq"))
    assert Counter(query.gallery for query in found.queries) == {"dress": 2017, "shirt": 2038, "toptee": 1961}
    sizes = [{name: len(ids) for name, ids in protocol.galleries.items()} for protocol in found.protocols]
    assert sizes[0] == {"dress": 3817, "shirt": 6346, "toptee": 5373}
    assert sizes[1] == {"dress": 2628, "shirt": 3089, "toptee": 2902}
    touched = Counter(query.gallery for query, clean in zip(found.queries, found.clean, strict=True) if not clean)
    assert touched == {"shirt": 141, "toptee": 107}  # measured on the files: no train triplet of others touches a dress
    assert found.queries[0].key == "dress.0"
    assert found.queries[0].text == "Is shiny and silver with shorter sleeves and fit and flare"
    assert [len(fashioniq.names(official.annotations("fashioniq"), part)) for part in get_args(Split)] == [
        45_429,
        15_415,
        15_417,
    ]


def test_a_perfect_ranking_gives_a_hundred_unless_the_reference_is_copied(tmp_path: Path, ray_session: None) -> None:
    benchmark = fashioniq.load(official.annotations("fashioniq"))
    found = official.means(official.score(tmp_path / "perfect", benchmark, official.of_targets))
    assert found.pop("reference first") == 0
    assert set(found.values()) == {100.0}
    own = ["R@10", "R@50", *(f"R@{k} {c}" for c in fashioniq.CATEGORIES for k in (10, 50))]
    labels = [fashioniq.VAL_PROTOCOL, CLEAN]
    assert list(found) == own + [f"{name} ({label})" for label in labels for name in own]
    copied = official.score(tmp_path / "copied", benchmark, official.of_references)
    assert official.means(copied)["reference first"] == 100  # it stays in the ranking
    ranked = copied.read_table("rankings/embeddings.parquet", RANKINGS)["image_ids"].to_pylist()
    assert all(ids[0] == query.reference for ids, query in zip(ranked, benchmark.queries, strict=True))


@pytest.mark.parametrize("removed", [False, True])
def test_random_vectors_give_the_closed_form(tmp_path: Path, ray_session: None, removed: bool) -> None:
    benchmark = fashioniq.load(official.annotations("fashioniq"), remove_reference=removed)
    output = official.score(tmp_path, benchmark)
    found = official.means(output)
    for protocol in benchmark.protocols:
        suffix = f" ({protocol.label})" if protocol.label else ""
        for k in (10, 50):
            for category, ids in protocol.galleries.items():
                count = sum(query.gallery == category for query in benchmark.queries)
                assert official.within_error(found[f"R@{k} {category}{suffix}"], k / (len(ids) - removed), count)
            mean = np.mean([found[f"R@{k} {category}{suffix}"] for category in fashioniq.CATEGORIES])
            assert found[f"R@{k}{suffix}"] == pytest.approx(mean)
    description = output.read_json("protocols.json")[0]["description"]
    assert f"the reference {'removed' if removed else 'kept'}" in description
    ranked = np.stack(output.read_table("rankings/embeddings.parquet", RANKINGS)["image_ids"].to_numpy())
    for category, ids in benchmark.protocols[0].galleries.items():
        rows = [query.gallery == category for query in benchmark.queries]
        assert np.isin(ranked[rows], ids).all()  # each category is a gallery of its own
