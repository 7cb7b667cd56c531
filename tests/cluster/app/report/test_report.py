"""The report, from the hand-written outputs of a small run on real photos."""

import base64
import json
import random
import re
import string
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from cir.evaluate import RANKINGS
from cluster.app import config as configs
from cluster.app.graph import Graph
from cluster.app.report import write_report
from cluster.app.report.results import collect_results
from cluster.app.report.words import duration, signed
from cluster.artifacts import MANIFEST, WARNINGS, Output
from cluster.stage import Stage
from mining import tables

SCRIPT = "<script>alert(1)</script> & make it oat"
QUERIES = 12
SEEDS = (0, 1)
METRICS = {"supervised": 57.6, "semi": 63.1, "shuffled": 39.0, "oracle": 77.3, "text_only": 41.2, "image_only": 5.5}
GAIN = {
    "baseline": "supervised",
    "metric": "R@1",
    "mean": 5.5,
    "low": 3.2,
    "high": 7.7,
    "generators": 1,
    "gap": {"mean": 0.4, "low": 0.1, "high": 0.7},
}
Photos = list[tuple[str, bytes]]


def graph_of(folder: Path, variants: list[str], **sections: Any) -> Graph:
    """The grocery preset with some of its variants, two seeds, and its outputs in a folder."""
    content = configs.read_config("grocery")
    content["root"] = str(folder)
    content["train"] |= {"seeds": list(SEEDS), "variants": {name: content["train"]["variants"][name] for name in variants}}
    path = folder / "run.yaml"
    for section, fields in sections.items():
        content[section] = content.get(section, {}) | fields
    path.write_text(yaml.safe_dump(content))
    return Graph(configs.load(str(path), []))


def write_outputs(graph: Graph, photos: Photos) -> None:
    """Every output that the report reads, and a manifest for each stage."""
    writers: dict[str, Callable[..., None]] = {"mine": _pairs, "generate": _deltas, "evaluate": _evaluation}
    writers |= dict.fromkeys(("align", "instruct"), _log) | {"train": _model}
    for stage in graph.stages:
        output = graph.output(stage)
        if stage.kind == "ingest":
            _ingest(stage, output, photos)
        elif stage.kind in writers:
            writers[stage.kind](graph, output)
        output.write_json(MANIFEST, stage._describe(output, 61.0, 2.0))


def ids(gallery: str, photos: Photos) -> list[int]:
    return [tables.stable_id(gallery, key) for key, _ in photos]


def _ingest(stage: Stage, output: Output, photos: Photos) -> None:
    name = stage.instance.partition(":")[2]
    if name in ("photos", "evaluate", "catalogue"):
        rows = [
            {"image_id": i, "key": key, "image": image, "sha256": "", "width": 1, "height": 1}
            for i, (key, image) in zip(ids(name, photos), photos, strict=True)
        ]
        output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.GALLERY), tables.GALLERY)
    elif name != "names":
        images = ids("evaluate" if name == "queries" else "photos", photos)
        rows = [triplet(i, images, [f"human text {i}"], "human") for i in range(QUERIES)]
        output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)


def triplet(i: int, images: list[int], deltas: list[str], source: str) -> dict[str, Any]:
    return {"triplet_id": i, "reference_id": images[2 * i], "target_id": images[2 * i + 1], "deltas": deltas, "source": source}


def _pairs(graph: Graph, output: Output) -> None:
    """Pairs of consecutive photos; of the walk, two groups of six whose pairs all hang on the anchor or on a neighbour."""
    images = graph.output(graph["ingest:photos"]).read_parts(tables.GALLERY, ["image_id"])["image_id"].to_pylist()
    if graph.config.mine.method == "walk":
        ranks = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)]
        places = [(group, 6 * group + r, 6 * group + t, r, t) for group in range(2) for r, t in ranks]
    else:
        places = [(None, 2 * i, 2 * i + 1, None, None) for i in range(10)]
    rows = [
        {"pair_id": i, "group_id": group, "reference_id": images[r], "target_id": images[t]}
        | {"reference_rank": rr, "target_rank": tr, "similarity": 0.25}
        for i, (group, r, t, rr, tr) in enumerate(places)
    ]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.PAIRS), tables.PAIRS)
    density = [0.0, 1.0, 1.0, 0.0]
    output.write_json("similarities.json", {"edges": [-1, -0.5, 0, 0.5, 1], "gallery": density, "mined": density})


def _deltas(graph: Graph, output: Output) -> None:
    images = graph.output(graph["ingest:photos"]).read_parts(tables.GALLERY, ["image_id"])["image_id"].to_pylist()
    texts = [SCRIPT, "show kiwi", "show kiwi", "make it oat milk"] * 2
    rows = [triplet(i, images, [text], "vdg") for i, text in enumerate(texts)]
    scores = [{"triplet_id": i, "scorer": tables.SCORER, "value": float(np.log(0.9 - 0.1 * i))} for i in range(len(texts))]
    output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.TRIPLETS), tables.TRIPLETS)
    output.write_table("scores/part-00000.parquet", pa.Table.from_pylist(scores, tables.SCORES), tables.SCORES)
    output.write_rejects("part-00000.parquet", [{"key": "9", "stage": "generate", "reason": "empty_delta", "detail": ""}])
    output.write_json(WARNINGS, ["2 of 8 deltas are <b>garbled</b>"])


def _log(graph: Graph, output: Output) -> None:
    """Step 20 was done twice, by a run that was cut off."""
    lines = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 9.0}, {"step": 20, "loss": 2.0, "val_mrr": 40.0}]
    output.write_bytes("metrics.jsonl", "\n".join(map(json.dumps, lines)).encode())


def _model(graph: Graph, output: Output) -> None:
    """Of the eight generated triplets the most confident 85 % were used."""
    _log(graph, output)
    output.write_json("cir.json", {"pseudo_triplets": 7 if "semi" in output.uri else 0})


def _evaluation(graph: Graph, output: Output) -> None:
    """Of the 12 queries the supervised model has the first 4 right, semi the last 9: one in both, 8 gained, 3 lost."""
    gallery = graph.output(graph["ingest:evaluate"]).read_parts(tables.GALLERY, ["image_id"])["image_id"].to_numpy()
    for name in graph.evaluation.models:
        right = np.arange(QUERIES) < 4 if name.startswith("supervised") else np.arange(QUERIES) >= 3
        columns = {
            "triplet_id": np.arange(QUERIES),
            "image_ids": [np.append(np.roll(gallery, -i)[:4], -1) for i in range(QUERIES)],
            "scores": [[0.5, 0.4, 0.3, 0.2, 0.1]] * QUERIES,
            "correct": [[first, False, False, False, False] for first in right.tolist()],
            "target_rank": np.ones(QUERIES, np.float32),
            "subset_rank": pa.nulls(QUERIES, pa.float32()),
            "reference_first": np.zeros(QUERIES, bool),
        }
        output.write_table(f"rankings/{name}.parquet", pa.table(columns, schema=RANKINGS), RANKINGS)
    variants = list(graph.config.train.variants)
    output.write_json("metrics.json", metrics_of(variants))
    output.write_json("folds.json", {})
    output.write_json(
        "gain.json", {name: GAIN for name in variants if name != "supervised"} if "supervised" in variants else {}
    )


def metrics_of(variants: list[str]) -> dict[str, Any]:
    return {
        name: {m: {"mean": METRICS[name] + k, "seeds": [METRICS[name] + k - 1, METRICS[name] + k + 1]} for m, k in _RECALLS}
        for name in variants
    }


_RECALLS = (("R@1", 0), ("R@5", 10), ("R@10", 15), ("exact R@1", -5))


def report_of(graph: Graph, photos: Photos) -> str:
    """The page, its outputs written before."""
    write_outputs(graph, photos)
    folder = Output(f"{graph.root}/runs/grocery")
    write_report(graph, folder)
    return folder.read_bytes("report.html").decode()


def text_of(page: str) -> str:
    """What a reader sees: no styles, no tags, single spaces."""
    page = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, photos: Photos) -> str:
    """The report of a run with every variant."""
    return report_of(graph_of(tmp_path_factory.mktemp("run"), list(METRICS)), photos)


def test_says_what_was_gained(page: str) -> None:
    text = text_of(page)
    sentence = "Pseudo triplets raise R@1 from 57.6 to 63.1 (+5.5, 95 % interval 3.2 to 7.7)"
    assert f"{sentence} with 12 labelled triplets and 7 generated ones." in text
    assert "semi 63.1 ± 1.4 73.1 ± 1.4 78.1 ± 1.4 +5.5 3.2 to 7.7" in text
    assert "12 labelled triplets and the most confident 85 % of the generated ones" in text
    assert "attributes are exactly the target’s" in text
    assert text.index("supervised 57.6") < text.index("semi 63.1") < text.index("Controls") < text.index("shuffled 39.0")
    assert text.index("text_only 41.2") < text.index("Other labels") < text.index("oracle 77.3")


def test_shows_examples_with_thumbnails(page: str) -> None:
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    pairs, generated = 8 * 2, (8 + 4 + 4) * 2
    queries = 4 + 2 + 1  # gained, lost, and the one that is right in both; each with the four images of either ranking
    assert len(images) == pairs + generated + queries * (1 + 2 * 4)
    sizes = {Image.open(BytesIO(base64.b64decode(image))).size for image in images}
    assert max(max(size) for size in sizes) <= 160
    text = text_of(page)
    assert "semi gained 8 and lost 3 (seed 0)" in text
    assert (text.count("▲ gained"), text.count("▼ lost"), text.count("= right before and after")) == (4, 2, 1)


def test_describes_the_deltas(page: str) -> None:
    text = text_of(page)
    assert "show kiwi" in text
    assert "different deltas 3" in text
    assert "exact repeats, generated 62 %" in text
    assert "1 empty delta" in text
    assert "90 % sure" in text


def test_says_what_the_stages_found_odd(page: str) -> None:
    assert "generate:photos: 2 of 8 deltas are &lt;b&gt;garbled&lt;/b&gt;" in page.replace("<b>", "").replace("</b>", "")


def test_is_safe_and_self_contained(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; make it oat" in page
    assert not re.search(r"https?:", page)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    ids_of_elements = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids_of_elements) == len(set(ids_of_elements))
    assert page.count("<svg") == 8  # gain, similarity, lengths, scores, align, instruct, retrieval, val_mrr
    assert "#1d2125" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_lists_every_stage(tmp_path: Path, photos: Photos) -> None:
    graph = graph_of(tmp_path, ["supervised"], tracking={"uri": "http://me:secret@server"})
    page = report_of(graph, photos)
    for stage in graph.stages:
        assert f"{stage.instance}</th><td><code>{stage.digest}" in page
    assert "secret" not in page
    assert "http://server" in page
    assert f"vdg run {tmp_path}/runs/grocery/config.yaml" in page


LETTERS = "".join(random.Random(0).choices(string.ascii_lowercase, k=1_000_000))


@pytest.mark.parametrize("text", [" ".join(map(str, range(160_000))), LETTERS], ids=["words", "one word"])
def test_a_text_of_a_megabyte_does_not_fill_it(
    tmp_path: Path, photos: Photos, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(tmp_path, ["supervised", "semi"])
    short = report_of(graph, photos)
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", text)
    long = report_of(graph, photos)
    assert len(long) < len(short) + 20_000
    assert f"{len(text):,} characters)" in long


def test_sections_vanish(tmp_path: Path, photos: Photos) -> None:
    graph = graph_of(tmp_path, ["supervised", "text_only"], evaluate={"attributes": None})
    page = report_of(graph, photos)
    text = text_of(page)
    assert "The supervised model reaches R@1 57.6 with 12 labelled triplets; no generated ones were used." in text
    assert "Only the target itself is right." in text
    for section in ("mined", "generated", "retrieval"):
        assert f'<section id="{section}">' not in page
    assert "<img" not in page
    assert "None" not in text.partition("The config")[0]


def test_without_a_baseline(tmp_path: Path, photos: Photos) -> None:
    text = text_of(report_of(graph_of(tmp_path, ["semi"]), photos))
    assert "The semi model reaches R@1 63.1" in text
    assert "there is no supervised model to compare" in text
    assert "Retrieval before and after" not in text


def test_walked_groups_are_strips_of_six(tmp_path: Path, photos: Photos) -> None:
    page = report_of(graph_of(tmp_path, ["supervised", "semi"], mine={"method": "walk"}), photos)
    section = page.partition('<section id="mined">')[2].partition("</section>")[0]
    assert section.count("<img") == 2 * 6
    assert section.count("anchor</small>") == 2


def test_a_benchmark_is_shown_with_its_protocol(tmp_path: Path, photos: Photos) -> None:
    section = {"benchmark": "cirr", "annotations": "cirr", "images": "img_raw", "triplets": None, "attributes": None}
    graph = graph_of(tmp_path, ["supervised", "semi"], evaluate=section)
    write_outputs(graph, photos)
    output = graph.output(graph.evaluation)
    names = ["R@1", "Rs@1", "Avg", "reference first", "R@1 (smaller gallery)"]
    row = {name: {"mean": 10.0 + i, "seeds": [10.0 + i] * 2} for i, name in enumerate(names)}
    output.write_json("metrics.json", {"supervised": row, "semi": row})
    output.write_json("protocols.json", [{"label": "", "description": "CIRR; the reference removed", "metrics": {}}])
    folder = Output(f"{graph.root}/runs/grocery")
    write_report(graph, folder)
    text = text_of(folder.read_bytes("report.html").decode())
    assert "CIRR; the reference removed. R@K is the share" in text
    assert "Model R@1 Rs@1 Avg Gain" in text  # other protocols are among all metrics
    assert f"Model {' '.join(names)} supervised 10.0 11.0 12.0 13.0 14.0" in text


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (-2.0, -3.5, -0.5, "Pseudo triplets lower R@1 from 57.6 to 63.1 (−2.0, 95 % interval −3.5 to −0.5)"),
        (0.4, -1.0, 1.8, "No clear gain: pseudo triplets move R@1 from 57.6 to 63.1 (+0.4, 95 % interval −1.0 to 1.8, which"),
    ],
)
def test_headline_is_honest(tmp_path: Path, mean: float, low: float, high: float, expected: str) -> None:
    config = graph_of(tmp_path, ["supervised", "semi"]).config
    rows = {"ingest:labelled": 800, "ingest:queries": 12}
    gains = {"semi": {**GAIN, "mean": mean, "low": low, "high": high}}
    pseudo = {"supervised": 0, "semi": 2950}
    sentence = collect_results(config, metrics_of(["supervised", "semi"]), gains, rows, pseudo).headline
    assert sentence.startswith(expected)
    assert sentence.endswith("with 800 labelled triplets and 2,950 generated ones")


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (12, 250, 3725)] == ["12 s", "4 min 10 s", "1 h 02 min"]
    assert [signed(v) for v in (5.46, -0.3, 0.01)] == ["+5.5", "−0.3", "0.0"]
