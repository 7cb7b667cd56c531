"""The paper's presets: complete, and they stop at once where their data and weights are not there."""

from pathlib import Path

import pytest

from cluster.app import config as configs
from cluster.app.cli import main
from cluster.app.graph import Graph
from cluster.errors import UserError
from tests.cluster.app.test_cli import RUNNER, app, fail

OFFLINE = {
    "clothing",
    "clothing-3",
    "demo",
    "grocery",
    "grocery-3",
    *(name for name in configs.presets() if name.startswith("ablation")),
}  # on the bundled photos
PAPER = sorted(set(configs.presets()) - OFFLINE)
MINING = [name for name in PAPER if not name.startswith("table1")]
TRIPLETS = {"cirr": 28_225, "fashioniq": 18_000}
MINED = {"cirr": 152_604, "fashioniq": 100_647}  # pairs of the paper's galleries NLVR2' and FashionIQ'
EPOCHS = {"clip": 10, "blip": 6}
TABLE_1 = {"supervised": "ingest:labelled", "human_vdg": "select:labelled.vdg", "vdg": "select:labelled.vdg-alone"}


def test_the_presets_are_those_that_are_promised() -> None:
    retrieval = ["cirr-blip", "cirr-clip", "fashioniq-blip", "fashioniq-clip", "table1-blip", "table1-clip"]
    generators = ["vdg-13b", "vdg-7b", "vdg-qwen"]
    assert retrieval + generators == PAPER


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without data, a hub that cannot be reached, and no weights in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("preset", MINING)
def test_a_dry_run_marks_every_input_as_missing(preset: str, elsewhere: Path) -> None:
    found = RUNNER.invoke(app, ["run", preset, "--dry-run"])
    shown = found.stdout
    assert isinstance(found.exception, UserError)
    assert "  found " not in shown
    for field in ("ingest.galleries.unlabelled.images", "ingest.triplets.labelled.file", "evaluate.", "mine.exclude."):
        assert f"missing {field}" in shown
    for instance in ("ingest:excluded-", "mine:unlabelled", "instruct:vdg", "generate:unlabelled", "train:semi.s0"):
        assert instance in shown
    assert ("align:vdg" in shown) is (preset != "vdg-qwen")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("preset", PAPER)
def test_a_run_names_what_is_missing_and_where_to_get_it(preset: str, elsewhere: Path) -> None:
    head, *lines = fail("run", preset).split("\n")
    lines = [line for line in lines if not line.startswith("  resources.")]  # GPUs that this machine lacks
    missing, origins = lines[::2], lines[1::2]
    assert head.endswith("thing(s) are missing or do not fit:")
    wanted = ("does not exist; correct the path or bring the files", "is not in the local cache and cannot be fetched")
    assert all(any(reason in line for line in missing) for reason in wanted)
    assert all(line.startswith("    ") for line in origins)
    assert len(missing) == len(origins)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("preset", PAPER)
def test_missing_weights_come_with_their_names_on_the_hub(preset: str) -> None:
    config = configs.load(preset, [])
    models = {field: one for stage in Graph(config).stages for field, one in stage.pretrained.items()}
    assert len(models) >= 3
    for field, model in models.items():
        with pytest.raises(UserError) as missing:
            model.check()
        problem = str(missing.value)
        origin = next(said for name, said in config.sources.items() if field.startswith(name))
        assert "is not in the local cache and cannot be fetched" in problem
        assert problem.split("'")[1] in origin


def test_the_command_ends_with_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["vdg", "run", PAPER[0]])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "thing(s) are missing" in capfd.readouterr().err


@pytest.mark.parametrize("preset", PAPER)
def test_steps_are_the_papers_epochs(preset: str) -> None:
    config = configs.load(preset, [])
    triplets = TRIPLETS[config.evaluate.benchmark]
    sizes = {name: MINED[config.evaluate.benchmark] if name == "pseudo_only" else triplets for name in config.train.variants}
    trainings = [(config.train.variant(name).training, EPOCHS[config.train.tower], size) for name, size in sizes.items()]
    for training, epochs, size in ((config.instruct.training, 10, triplets), *trainings):
        assert training.steps == pytest.approx(epochs * size / training.batch_size, abs=1)
    if config.align is not None:
        assert config.align.training.steps == pytest.approx(595_375 / config.align.training.batch_size, abs=1)


@pytest.mark.parametrize("part", ["vdg-7b", "vdg-qwen"])
def test_a_retrieval_preset_takes_another_generator(part: str, elsewhere: Path) -> None:
    own = elsewhere / "own.yaml"
    own.write_text(f"extends: [cirr-blip, parts/{part}]\nname: own\n")
    config = configs.load(str(own), [])
    assert config.train.tower == "blip"
    assert config.vdg == configs.load(part, []).vdg


@pytest.mark.parametrize("preset", MINING)
def test_rows_of_the_paper_learn_from_the_generators_deltas_of_the_labelled_pairs(preset: str) -> None:
    train = configs.load(preset, []).train
    own = {name for name in train.variants if train.variant(name).own_deltas}
    assert own == {"semi", "human_vdg", "vdg"} & set(train.variants)


@pytest.mark.parametrize("tower", ["blip", "clip"])
def test_table_1_is_trained_and_tested_on_the_generators_deltas(tower: str) -> None:
    human, generated = (Graph(configs.load(f"{preset}-{tower}", [])) for preset in ("cirr", "table1"))
    assert "deltas" not in human.evaluation.parents
    assert generated.evaluation.parents["deltas"].instance == "generate:queries"
    for variant, triplets in TABLE_1.items():
        trained = human[f"train:{variant}.s0"]
        assert trained.parents["triplets"].instance == triplets
        assert trained.digest == generated[f"train:{variant}.s0"].digest  # (a) and (d), (b) and (e), (c) and (f) share a model
    assert {stage.instance for stage in generated.stages if stage.kind == "train"} == {f"train:{name}.s0" for name in TABLE_1}


@pytest.mark.parametrize(("preset", "joins", "train"), [("cirr-clip", False, True), ("fashioniq-clip", True, False)])
def test_captions_and_galleries_are_those_of_the_paper(preset: str, joins: bool, train: bool) -> None:
    graph = Graph(configs.load(preset, []))
    assert graph["ingest:labelled"].settings["join"] is joins
    (excluded,) = [stage for stage in graph.stages if stage.instance.startswith("ingest:excluded-")]
    listed = {Path(file).name for file in excluded.annotations.files}  # type: ignore[attr-defined]
    assert any(".train." in name for name in listed) is train
