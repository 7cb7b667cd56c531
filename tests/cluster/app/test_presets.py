"""The paper's presets: complete, and they stop at once where their data and weights are not there."""

from pathlib import Path

import pytest

from cluster.app import config as configs
from cluster.app.cli import main
from cluster.app.graph import Graph
from tests.cluster.app.test_cli import fail, invoke

OFFLINE = {
    "clothing",
    "clothing-3",
    "demo",
    "grocery",
    "grocery-3",
    *(name for name in configs.presets() if name.startswith("ablation")),
}  # on the bundled photos
PAPER = sorted(set(configs.presets()) - OFFLINE)
TRIPLETS = {"cirr": 28_225, "fashioniq": 18_000}


def test_the_presets_are_those_that_are_promised() -> None:
    assert PAPER == ["cirr-blip", "cirr-clip", "fashioniq-blip", "fashioniq-clip", "vdg-13b", "vdg-7b", "vdg-qwen"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without data, a hub that cannot be reached, and no weights in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("preset", PAPER)
def test_a_dry_run_marks_every_input_as_missing(preset: str, elsewhere: Path) -> None:
    shown = invoke("run", preset, "--dry-run")
    assert "  found " not in shown
    for field in ("ingest.galleries.unlabelled.images", "ingest.triplets.labelled.file", "evaluate.", "mine.exclude."):
        assert f"missing {field}" in shown
    for instance in ("ingest:excluded-", "mine:unlabelled", "instruct:vdg", "generate:unlabelled", "train:semi.s0"):
        assert instance in shown
    assert ("align:vdg" in shown) is (preset != "vdg-qwen")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("preset", PAPER)
def test_a_run_names_what_is_missing_and_where_to_get_it(preset: str, elsewhere: Path) -> None:
    lines = fail("run", preset).split("\n")
    missing, origins = lines[1::2], lines[2::2]
    assert lines[0] == f"{len(missing)} thing(s) are missing or do not fit:"
    wanted = ("does not exist; correct the path or bring the files", "is not in the local cache and cannot be fetched")
    assert all(any(reason in line for line in missing) for reason in wanted)
    assert all(line.startswith("    ") for line in origins)
    assert len(missing) == len(origins)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("preset", PAPER)
def test_missing_weights_come_with_their_names_on_the_hub(preset: str) -> None:
    config = configs.load(preset, [])
    weights = {field: one for stage in Graph(config).stages for field, one in stage.weights.items()}
    problems = {field: one.problem() or "" for field, one in weights.items()}
    assert len(problems) >= 3
    for field, problem in problems.items():
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
    epochs = {"clip": 10, "blip": 6}[config.train.tower]
    for training, count in ((config.instruct.training, 10), (config.train.training, epochs)):
        assert training.steps == pytest.approx(count * triplets / training.batch_size, abs=1)
    if config.align is not None:
        assert config.align.training.steps == pytest.approx(595_375 / config.align.training.batch_size, abs=1)


@pytest.mark.parametrize("part", ["vdg-7b", "vdg-qwen"])
def test_a_retrieval_preset_takes_another_generator(part: str, elsewhere: Path) -> None:
    own = elsewhere / "own.yaml"
    own.write_text(f"extends: [cirr-blip, parts/{part}]\nname: own\n")
    config = configs.load(str(own), [])
    assert config.train.tower == "blip"
    assert config.vdg == configs.load(part, []).vdg
