"""A finished run of every stage on 48 real photos with tiny models, shared by the tests that use what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.app import config as configs
from cluster.app import runner
from cluster.app.graph import Graph
from cluster.monitor import Monitor
from tests.cluster.app.test_cli import invoke

STEPS = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3}
COLOURS = ["red", "green", "yellow"]
SELECTION = {"scorers": ["log_probability", "agreement", "round_trip"], "top_fraction": 0.9, "weight_power": 1.0}
BEST = {"pseudo": True, "own_deltas": True, "selection": SELECTION}  # of the second round


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, photos: list[tuple[str, bytes]]) -> Path:
    """A folder of 48 photos with triplets, captions and attributes."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "photos").mkdir()
    names = [key for key, _ in photos[:48]]
    for key, content in photos[:48]:
        (folder / "photos" / f"{key}.jpg").write_bytes(content)
    rows = [
        {"pairid": i, "reference": names[i], "target": names[(i * 7 + 3) % 48], "captions": [f"make it {COLOURS[i % 3]}"]}
        for i in range(40)
    ]
    (folder / "triplets.json").write_text(json.dumps(rows))
    (folder / "captions.json").write_text(json.dumps([{"image": name, "caption": "fruit: ripe"} for name in names]))
    (folder / "attributes.json").write_text(json.dumps({name: {"colour": COLOURS[i % 3]} for i, name in enumerate(names)}))
    return folder


@pytest.fixture(scope="session")
def config(world: Path, tower: Any, tiny_bert: dict[str, Any], language_model: Any) -> str:
    """A run of every stage, in two rounds, with three variants."""
    content = {
        "name": "tiny",
        "root": str(world / "root"),
        "ingest": {
            "galleries": {"photos": {"images": str(world / "photos")}},
            "triplets": {"labelled": {"gallery": "photos", "file": str(world / "triplets.json")}},
            "captions": {"names": {"gallery": "photos", "file": str(world / "captions.json"), "until": ":"}},
            "shard_rows": 20,
        },
        "embed": {"towers": {"photo": tower.model_dump(mode="json")}, "views": {"count": 2}},
        "mine": {
            "gallery": "photos",
            "tower": "photo",
            "method": "matched",
            "triplets": "labelled",
            "matched": {"pairs": 40},
            "part_rows": 20,
        },
        "vdg": {"tower": "photo", "language_model": language_model.model_dump(mode="json"), "prompt": "short", "lora_rank": 2},
        "align": {"captions": "names", "training": STEPS},
        "instruct": {"triplets": "labelled", "training": STEPS},
        "generate": {"max_new_tokens": 6, "samples": 2, "views": True},
        "rounds": {"count": 2},
        "train": {
            "tower": "photo",
            "triplets": "labelled",
            "text": tiny_bert,
            "fusion": "residual",
            "training": STEPS,
            "variants": {"supervised": {}, "semi": {"pseudo": True, "round": 1}, "best": BEST},
        },
        "evaluate": {
            "images": str(world / "photos"),
            "triplets": str(world / "triplets.json"),
            "attributes": str(world / "attributes.json"),
        },
        "resources": {name: {"workers": 0} for name in ("align", "instruct", "train")},
    }
    path = world / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="session")
def finished(ray_session: None, config: str) -> Graph:
    """The graph after `vdg run`, and what is made beside a run."""
    shown = invoke("run", config)
    graph = Graph(configs.load(config, []))
    for name in ("metrics.json", "report.html", "log.txt"):
        assert runner.run_folder(graph.config).path(name) in shown
    for stage in graph.beside:
        stage.run(graph.root, Monitor())
    return graph
