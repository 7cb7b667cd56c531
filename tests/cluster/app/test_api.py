"""What a finished run and an export answer from Python and the command line."""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from cir.evaluate import RANKINGS
from cir.index import Thumbnails
from cir.metrics import NO_IMAGE
from cir.search import Model
from cir.train import Train
from cluster.app.api import Run, load_model
from cluster.app.graph import Graph
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.stage import RunContext as At
from mining import tables
from mining.embed import Embed
from mining.images import decode
from tests.cluster.app.test_cli import RUNNER, app
from vdg.generate import Generate


@pytest.fixture(scope="module")
def run(finished: Graph) -> Run:
    assert finished.index is not None
    finished.index.run(finished.root, Monitor())
    return Run.open(finished.root, "tiny")


def test_every_model_ranks_every_query_as_evaluate_does(run: Run) -> None:
    graph = run.graph
    queries = graph.output(graph.evaluation.parents["queries"]).read_parts(tables.TRIPLETS).to_pylist()
    for name in run.models:
        ranking = graph.output(graph.evaluation).read_table(f"rankings/{name}.parquet", RANKINGS)
        for query, image_ids in zip(queries, ranking["image_ids"].to_pylist(), strict=True):
            expected = [image_id for image_id in image_ids if image_id != NO_IMAGE]
            found = run.search(query["reference_id"], query["deltas"][0], model=name, top=len(expected))
            assert [hit.image_id for hit in found] == expected


def test_a_file_of_the_gallery_starts_from_its_image(run: Run, world: Path) -> None:
    path = sorted((world / "photos").iterdir())[3]
    reference = run.reference(path)
    assert reference.image_id is not None
    known = run.searcher.known(reference.image_id)
    assert np.allclose(reference.vector, known.vector, atol=2e-2)
    by_file, by_bytes = (run.search(image, "make it red", top=5) for image in (str(path), path.read_bytes()))
    assert by_file == by_bytes
    assert reference.image_id not in [hit.image_id for hit in by_file]
    assert [hit.rank for hit in by_file] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("image", "message"), [("nowhere.jpg", "has this name"), (b"text", "cannot be read"), (7, "of this id")]
)
def test_what_is_no_image_is_named(run: Run, image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.search(image, "make it red")


def test_metrics_and_triplets_of_the_run(run: Run, finished: Graph) -> None:
    assert set(run.metrics()) == {"supervised", "semi", "best"}
    table = run.triplets()
    assert {"reference", "target", "delta", "log_probability"} <= set(table.columns)
    assert table["reference"].notna().all()
    assert (table["log_probability"] <= 0).all()
    with pytest.raises(UserError, match="does not exist; give the root"):
        Run.open(finished.root, "other")


def test_thumbnails_are_small_and_named(run: Run) -> None:
    thumbnails = run.thumbnails
    assert set(thumbnails) == set(run.searcher.matrix("semi.s0").image_ids.tolist())
    image = decode(thumbnails[next(iter(thumbnails))])
    assert max(image.size) <= 256


def test_an_index_goes_on_from_its_parts(finished: Graph, tmp_path: Path) -> None:
    stage = finished.index
    assert stage is not None
    made, root = stage.output(finished.root), stage.output(str(tmp_path))
    part = made.parts()[0]
    for name in (part, f"packs/{part.replace('parquet', 'arrow')}"):
        root.write_bytes(name, made.read_bytes(name))
    stage.work(root, At(finished.root, Monitor()))
    assert dict(Thumbnails(root)) == dict(Thumbnails(made))


def test_an_export_answers_alone_and_its_snippet_runs(
    run: Run, finished: Graph, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exported"
    RUNNER.invoke(app, ["export", finished.root, "semi.s0", str(folder)], catch_exceptions=False)
    card = (folder / "README.md").read_text()
    row = run.metrics()["semi"]
    assert f"R@1: {row['R@1']['seeds'][0]:.1f}" in card
    monkeypatch.chdir(tmp_path)
    exec(card.partition("```python")[2].partition("```")[0], {})
    model = load_model(folder)
    assert isinstance(model, Model)
    path = sorted((world / "photos").iterdir())[3]
    reference = run.reference(path)
    assert np.allclose(model.query(decode(path.read_bytes()), "red"), run.searcher.compose("semi.s0", [(reference, "red")])[0])
    ids = list(run.thumbnails)[:3]
    images = [decode((world / "photos" / f"{key}").read_bytes()) for key in _files(run, ids, world)]
    wanted = run.searcher.matrix("semi.s0")
    rows = [int(np.flatnonzero(wanted.image_ids == i)[0]) for i in ids]
    assert np.allclose(model.images(images), wanted.vectors[rows], atol=2e-2)
    with pytest.raises(UserError, match="give a folder that `vdg export` wrote"):
        load_model(tmp_path)


def _files(run: Run, ids: list[int], world: Path) -> list[str]:
    names = {path.stem: path.name for path in (world / "photos").iterdir()}
    return [names[Path(key).stem] for key in run.searcher.keys(np.array(ids))]


def test_the_command_prints_a_table_json_and_a_page(run: Run, config: str, world: Path, tmp_path: Path) -> None:
    path = str(sorted((world / "photos").iterdir())[0])
    arguments = ["search", config, "--image", path, "--text", "<b>red</b>", "--top", "3"]
    assert set(json.loads(RUNNER.invoke(app, [*arguments, "--json"]).stdout)) == {run.recommended}
    arguments += ["--models", "supervised.s0,semi.s0,best.s0"]
    found = RUNNER.invoke(app, [*arguments, "--json", "--html", str(tmp_path / "a.html")], catch_exceptions=False)
    printed = json.loads(found.stdout)
    assert set(printed) == {"supervised.s0", "semi.s0", "best.s0"}
    assert [hit["rank"] for hit in printed["semi.s0"]] == [1, 2, 3]
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/jpeg") == 1 + 9
    assert "&lt;b&gt;red&lt;/b&gt;" in page
    shown = RUNNER.invoke(app, [*arguments, "--models", "semi.s0"], catch_exceptions=False).stdout
    assert printed["semi.s0"][0]["key"] in shown
    with pytest.raises(UserError, match=r"--models worst\.s0: there is none"):
        RUNNER.invoke(app, [*arguments, "--models", "worst.s0"], catch_exceptions=False)


def test_an_index_is_no_waste(run: Run, finished: Graph) -> None:
    from cluster.app.outputs import users

    assert finished.index is not None
    assert users(finished)[f"{finished.index.instance}-{finished.index.digest}"]


def test_a_run_of_other_code_opens_as_it_was_evaluated(run: Run, finished: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run.search(next(iter(run.thumbnails)), "make it red", top=5)
    for stage in (Embed, Train, Generate):
        monkeypatch.setattr(stage, "version", stage.version + 1)
    opened = Run.open(finished.root, "tiny")
    assert opened.models == run.models
    assert opened.search(next(iter(opened.thumbnails)), "make it red", top=5) == expected
    assert opened.triplets().equals(run.triplets())
    with pytest.raises(UserError, match=r"is not evaluated .*`Run\.open` opens it"):
        Run(Graph(finished.config))


def test_a_registered_model_loads_by_its_alias(run: Run, finished: Graph, world: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{finished.root}/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/vdg.semi.s0@run-tiny")
    path = sorted((world / "photos").iterdir())[3]
    table = pd.DataFrame({"image": [str(path), path.read_bytes()], "text": ["red", None]})
    query, image = model.predict(table)
    assert np.allclose(query, run.searcher.compose("semi.s0", [(run.reference(path), "red")])[0])
    assert run.searcher.matrix("semi.s0").nearest(image, 1, None).image_ids.tolist() == [run.reference(path).image_id]
    stored = [path for path in Path(finished.root, "mlartifacts").rglob("*") if path.is_file() and "models" in path.parts]
    assert {path.name for path in stored} <= {"MLmodel", "place.json", "registered_model_meta"}  # the last is MLflow's own
