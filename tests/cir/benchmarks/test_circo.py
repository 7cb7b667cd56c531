"""CIRCO's own files and protocol; the list of COCO's images is made up around those that the annotations name."""

import json
from pathlib import Path

import numpy as np
import pytest

from cir.benchmarks import circo
from cir.benchmarks.circo import Circo
from cluster.errors import UserError
from tests.cir.benchmarks import official


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return official.circo_folder(tmp_path_factory.mktemp("circo"))


@pytest.fixture(scope="module")
def val(folder: str) -> Circo:
    return circo.load(folder, "val")


def test_the_official_files_are_read_as_they_are(folder: str, val: Circo) -> None:
    test = circo.load(folder, "test")
    assert (len(val.queries), len(test.queries), len(val.names)) == (220, 800, 123_403)
    assert test.hidden
    first = val.queries[0]
    assert (first.key, first.text) == ("0", "shows two people and has a more colorful background")
    assert "umbrella" not in first.text  # of the shared concept
    assert [val.names[i] for i in first.targets] == ["000000355099", "000000528417", "000000534704"]
    assert np.mean([len(query.targets) for query in val.queries]) == pytest.approx(4.16, abs=0.01)


def _ranked(val: Circo, perfect: bool) -> np.ndarray:
    """Ids [queries, 50]: the right images first, or, second to last of ten, the first of them alone."""
    others = np.setdiff1d(list(val.names), val.query_images)[:50].tolist()
    rows = [[*query.targets, *others] if perfect else [*others[:8], query.targets[0], *others[8:]] for query in val.queries]
    return np.array([row[:50] for row in rows])


def test_rankings_by_hand(val: Circo) -> None:
    protocol = val.protocols[0]
    perfect = val.figures(protocol, official.ranking(val, protocol, _ranked(val, True)))[""]
    assert perfect.pop("reference first").sum() == 0
    assert all((values == 1).all() for values in perfect.values())
    assert len([name for name in perfect if name.startswith("mAP@10 ")]) == 9
    ninth = val.figures(protocol, official.ranking(val, protocol, _ranked(val, False)))[""]
    right = np.array([len(query.targets) for query in val.queries])
    assert ninth["mAP@5"].sum() == 0
    assert ninth["mAP@10"] == pytest.approx(1 / 9 / np.minimum(right, 10))
    assert (ninth["R@5"].mean(), ninth["R@10"].mean()) == (0, 1)
    assert len(ninth["mAP@10 negation"]) == 21


@pytest.mark.parametrize("part", ["val", "test"])
def test_the_submission_is_in_the_servers_form(folder: str, tmp_path: Path, ray_session: None, part: str) -> None:
    benchmark = circo.load(folder, part)  # type: ignore[arg-type]
    output = official.score(tmp_path, benchmark, official.of_references)
    content = output.read_json(f"submissions/embeddings/{part}.json")
    assert list(content) == [str(i) for i in range(len(benchmark.queries))]
    for query in benchmark.queries:
        ids = content[query.key]
        assert len(ids) == len(set(ids)) == 50
        assert all(type(i) is int for i in ids)
        assert ids[0] == int(benchmark.names[query.reference])  # it is not removed
    assert bool(output.read_json("metrics.json")) is (part == "val")


def test_a_short_list_of_images_is_named(folder: str, tmp_path: Path) -> None:
    path = tmp_path / circo.COCO
    path.parent.mkdir(parents=True)
    content = json.loads(Path(folder, circo.COCO).read_text())
    path.write_text(json.dumps({"images": content["images"][:-3]}))
    with pytest.raises(UserError, match=r"image_info_unlabeled2017.json: found 123,400 images, expected 123,403"):
        circo.names(str(tmp_path), "val")
    path.write_text("[]")
    with pytest.raises(UserError, match="expected COCO's object"):
        circo.names(str(tmp_path), "val")
