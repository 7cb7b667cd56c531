"""A benchmark's images do not reach the pairs of a run that excludes it."""

from pathlib import Path
from typing import Any

import yaml

from cluster.app import config as configs
from cluster.app import runner
from cluster.app.graph import Graph
from mining import tables
from mining.gallery import keys
from tests.cir.benchmarks import official


def test_images_named_as_cirrs_are_not_mined(
    ray_session: None, store: Path, tmp_path: Path, photos: list[tuple[str, bytes]], tower: Any
) -> None:
    held_out = ["dev-244-0-img0", "test1-147-1-img1", "dev-99999-9-img9"]  # of val, of test, of NLVR2's dev alone
    names = [*held_out, *(f"train-{i}-0-img0" for i in range(45))]
    for name, (_, content) in zip(names, photos, strict=False):
        (tmp_path / "photos" / "0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "0" / f"{name}.jpg").write_bytes(content)
    content: dict[str, Any] = {
        "extends": "grocery",
        "root": str(store.parent),
        "ingest": {"galleries": {"photos": {"images": str(tmp_path / "photos")}}},
        "embed": {"towers": {"tiny": tower.model_dump(mode="json")}, "views": {"count": 1}},
        "mine": {"tower": "tiny", "method": "random", "triplets": None, "random": {"pairs": 500}},
    }
    content["mine"]["exclude"] = {"cirr": {"annotations": official.annotations("cirr")}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    graph = Graph(configs.load(str(tmp_path / "run.yaml"), []))
    runner.run(graph, graph.select("mine", None, None))
    mined, excluded = (graph.output(graph[f"{kind}:photos"]) for kind in ("mine", "exclude"))
    manifest = excluded.manifest()
    assert manifest is not None
    assert manifest["rejects"] == {"excluded_name": 2, "excluded_prefix": 1}
    assert {key.rpartition("/")[2] for key in excluded.rejects()["key"].to_pylist()} == set(held_out)
    known = {image_id: key for key, image_id in keys(graph.output(graph["ingest:photos"])).items()}
    pairs = mined.read_parts(tables.PAIRS)
    assert len(pairs) == 500
    assert not set(held_out) & {known[image_id].rpartition("/")[2] for image_id in tables.images_of(pairs).tolist()}
