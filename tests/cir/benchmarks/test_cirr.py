"""CIRR's own files and protocol."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cir.benchmarks import cirr
from cir.benchmarks.benchmark import Protocol
from cir.evaluate import RANKINGS
from cluster.errors import UserError
from tests.cir.benchmarks import official

RESTRICTED = "references ∪ targets gallery, 2,265 images"


def test_the_official_files_are_read_as_they_are() -> None:
    val, test = (cirr.load(official.annotations("cirr"), part) for part in ("val", "test"))
    assert [(len(b.queries), [len(p.galleries[""]) for p in b.protocols]) for b in (val, test)] == [
        (4181, [2297, 2265]),
        (4148, [2315, 2178]),
    ]
    first = val.queries[0]
    assert (first.key, first.text) == ("12060", "show three bottles of soft drink")
    assert val.names[first.reference] == "dev-244-0-img0"
    assert [val.names[i] for i in first.targets] == ["dev-1028-1-img1"]
    assert {val.names[i] for i in first.members} >= {"dev-244-0-img0", "dev-1028-1-img1", "dev-63-0-img1"}
    assert test.hidden
    assert not val.hidden
    assert next(iter(cirr.names(official.annotations("cirr"), "val").values())) == "./dev/dev-244-0-img0.png"


def test_a_perfect_ranking_gives_a_hundred(tmp_path: Path, ray_session: None) -> None:
    found = official.means(official.score(tmp_path, cirr.load(official.annotations("cirr"), "val"), official.of_targets))
    assert found.pop("reference first") == 0
    assert set(found.values()) == {100.0}
    assert list(found) == [
        *("R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3", "Avg"),
        *(f"{name} ({RESTRICTED})" for name in ("R@1", "R@5", "R@10", "R@50", "Avg")),
    ]


def test_the_reference_is_excluded_and_told_where_it_would_be_first(tmp_path: Path, ray_session: None) -> None:
    benchmark = cirr.load(official.annotations("cirr"), "val")
    output = official.score(tmp_path, benchmark, official.of_references)
    assert official.means(output)["reference first"] == 100
    references = np.array([query.reference for query in benchmark.queries])[:, None]
    for folder in ("", "restricted/"):
        ranked = np.stack(output.read_table(f"rankings/{folder}embeddings.parquet", RANKINGS)["image_ids"].to_numpy())
        assert not (ranked == references).any()
    for name in ("recall", "recall_subset", "recall_restricted"):
        content = output.read_json(f"submissions/embeddings/{name}.json")
        assert not any(benchmark.names[query.reference] in content[query.key] for query in benchmark.queries)
    controls = output.read_json("controls.json")
    assert controls["metrics"]["image_only"]["R@1"] == output.read_json("metrics.json")["embeddings"]["R@1"]
    assert set(controls["left_out"]) == {"text_only", "sum"}


def test_a_gallery_of_references_alone_caps_the_recall(tmp_path: Path, ray_session: None) -> None:
    benchmark = cirr.load(official.annotations("cirr"), "val")
    references = np.unique([query.reference for query in benchmark.queries])
    capped = Protocol("official", "", {"": references}, remove_reference=True)
    found = official.means(
        official.score(tmp_path, replace(benchmark, protocols=(capped, benchmark.protocols[1])), official.of_targets)
    )
    assert [round(found[f"R@{k}"], 2) for k in (1, 5, 10, 50)] == [96.77] * 4
    assert found[f"R@1 ({RESTRICTED})"] == 100


def test_hidden_labels_give_submission_files_alone_in_the_servers_form(tmp_path: Path, ray_session: None) -> None:
    folder = official.annotations("cirr")
    benchmark = cirr.load(folder, "test")
    output = official.score(tmp_path, benchmark)
    assert output.read_json("metrics.json") == {}
    members = {query.key: {benchmark.names[i] for i in query.members} for query in benchmark.queries}
    for name, metric, count in (
        ("recall", "recall", 50),
        ("recall_subset", "recall_subset", 3),
        ("recall_restricted", "recall", 50),
    ):
        written = output.read_bytes(f"submissions/embeddings/{name}.json")
        content = json.loads(written)
        example = json.loads(Path(folder, "server_examples", f"{metric}.first5.json").read_text())
        assert len(written) <= 5 * 10**6
        assert list(content)[:2] == list(example)[:2]
        assert {key: content[key] for key in ("version", "metric")} == {key: example[key] for key in ("version", "metric")}
        assert len(content) == 2 + 4148
        for key in list(example)[2:]:
            assert [type(entry) for entry in content[key]] == [type(entry) for entry in example[key]]
            assert len(content[key]) == len(example[key]) == count
            assert set(content[key]) <= set(benchmark.names.values())
        assert all(len(set(content[key])) == count for key in members)
        if metric == "recall_subset":
            assert all(set(content[key]) <= names for key, names in members.items())


def _without_a_query(rows: Any) -> Any:
    return rows[:-1]


def _without_an_image(split: Any) -> Any:
    return dict(list(split.items())[1:])


def _renamed(rows: Any) -> Any:
    return [{**rows[0], "reference": "dev-0-0-img9"}, *rows[1:]]


def _without_caption(rows: Any) -> Any:
    return [rows[0], {**rows[1], "caption": None}, *rows[2:]]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("captions/cap.rc2.val.json", _without_a_query, "cap.rc2.val.json: found 4,180 queries, expected 4,181"),
        ("image_splits/split.rc2.val.json", _without_an_image, "split.rc2.val.json: found 2,296 images, expected 2,297"),
        ("captions/cap.rc2.val.json", _renamed, "query 12060 names 'dev-0-0-img9', which the image split does not list"),
        ("captions/cap.rc2.val.json", _without_caption, "cap.rc2.val.json: row 1: caption: Input should be a valid string"),
    ],
)
def test_files_that_are_not_the_official_ones_are_named(
    tmp_path: Path, file: str, change: Callable[[Any], Any], message: str
) -> None:
    for name in ("captions", "image_splits"):
        shutil.copytree(Path(official.annotations("cirr"), name), tmp_path / name)
    path = tmp_path / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        cirr.load(str(tmp_path), "val")
