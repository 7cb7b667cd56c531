"""The command, on configs that stop before any model is loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.app import config as configs
from cluster.app.cli import app, main
from cluster.artifacts import Output
from cluster.driver import lease
from cluster.errors import UserError

RUNNER = CliRunner()


def invoke(*arguments: str) -> str:
    """All that the command prints; errors are raised."""
    result = RUNNER.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def fail(*arguments: str) -> str:
    """The message of a user's mistake."""
    with pytest.raises(UserError) as error:
        RUNNER.invoke(app, list(arguments), catch_exceptions=False)
    return str(error.value)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The grocery preset with its outputs in a fresh folder."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"extends": "grocery", "root": str(tmp_path / "root")}))
    return str(path)


def test_dry_run_shows_every_instance_and_touches_nothing(config: str, tmp_path: Path) -> None:
    shown = invoke("run", config, "--dry-run")
    for instance in ("ingest:photos", "embed:photo.photos", "mine:photos", "instruct:vdg", "train:semi.s2", "evaluate:all"):
        assert instance in shown
    assert "to do" in shown
    assert not (tmp_path / "root").exists()


def test_dry_run_marks_what_is_missing_and_ends_with_the_status_of_a_run(config: str) -> None:
    given = ["--set", "evaluate.images=nowhere", "--set", "vdg.language_model={package: no_such_package}"]
    result = RUNNER.invoke(app, ["run", config, "--dry-run", *given])
    assert "missing evaluate.images: nowhere" in result.stdout
    assert "found   evaluate.triplets" in result.stdout
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == fail("run", config, *given)
    assert "vdg.language_model: weights: Python package 'no_such_package' is not installed" in str(result.exception)


def test_until_and_only_select_instances_with_what_they_need(config: str) -> None:
    assert "align:vdg" not in invoke("run", config, "--dry-run", "--until", "mine")
    shown = invoke("train", config, "--dry-run", "--only", "train:supervised.s0")
    assert "train:supervised.s0" in shown
    assert "generate" not in shown
    assert "no such stage" in fail("run", config, "--until", "traim")
    assert "no stage instance matches" in fail("train", config, "--only", "train:none.*")


def test_missing_image_folder_stops_before_any_work(config: str, tmp_path: Path) -> None:
    message = fail("run", config, "--set", "ingest.galleries.photos.images=nowhere")
    assert "ingest.galleries.photos.images: nowhere does not exist; correct the path or bring the files" in message
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("train.training.batchsize=3", "train.training.batchsize"),
        ("embed.batch_size=-1", "embed.batch_size"),
        ("mine.gallery=nowhere", "mine.gallery: 'nowhere' is not defined"),
        ("train.variants.semi.zero=both", "train.variants.semi"),
        ("align.captions=none", "align.captions: 'none' is not defined"),
        ("ingest.triplets.photos={gallery: photos, file: x.json}", "two sources have the name 'photos'"),
        ("mine.exclude.coco={annotations: x}", "mine.exclude.coco"),
        ("ingest.galleries.a/b={images: x}", "the name 'a/b' is part of a folder's name"),
        ("train.seeds=[1", "--set train.seeds=[1: the value is not valid YAML"),
        ("instruct.training.micro_batch=3", "batch_size 16 is no multiple"),
        ("vdg.language_model={package: no_such_package}", "vdg.language_model: weights: Python package 'no_such_package'"),
        ("evaluate.attributes=README.md", "evaluate.attributes: README.md"),
    ],
)
def test_wrong_configs_name_the_field(config: str, assignment: str, expected: str) -> None:
    assert expected in fail("run", config, "--set", assignment)


def test_unknown_preset() -> None:
    assert "neither a YAML file nor a preset" in fail("run", "grocerry")


def test_unreachable_mlflow_stops_before_any_work(config: str, tmp_path: Path) -> None:
    message = fail("run", config, "--set", "tracking.uri=http://127.0.0.1:9")
    assert "tracking.uri: MLflow at http://127.0.0.1:9 cannot be used" in message
    assert not [path for path in (tmp_path / "root").rglob("*") if path.is_file()]


def test_mistakes_are_one_message_on_standard_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["vdg", "run", "nothing"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: nothing:")
    assert "Traceback" not in captured.err


def test_a_store_out_of_reach_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.chdir(tmp_path)
    root = "root=s3://bucket/root?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1"
    monkeypatch.setattr("sys.argv", ["vdg", "ls", "grocery", "--set", root, "--set", "tracking.uri=sqlite:///none.db"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "error: a store cannot be used: OSError" in (shown := capfd.readouterr().err)
    assert "AWS Error" in shown
    assert "Traceback" not in shown


def test_an_answer_goes_to_standard_output_alone() -> None:
    result = RUNNER.invoke(app, ["presets"], catch_exceptions=False)
    assert "grocery" in result.stdout
    assert result.stderr == ""


def test_every_preset_is_listed_and_valid() -> None:
    shown = invoke("presets")
    for name in configs.presets():
        assert name in shown
        configs.load(name, [])


def test_what_is_missing_comes_with_where_to_get_it(config: str) -> None:
    origins = "sources={ingest.galleries: from the shop, ingest.galleries.photos: ask the photographer}"
    given = ["--set", origins, "--set", "ingest.galleries.photos.images=nowhere", "--set", "evaluate.images=nowhere"]
    assert fail("run", config, *given).split("\n")[1:] == [
        "  evaluate.images: nowhere does not exist; correct the path or bring the files",
        "  ingest.galleries.photos.images: nowhere does not exist; correct the path or bring the files",
        "    ask the photographer",
    ]
    weights = ["--set", "embed.towers.photo.weights={package: none}", "--set", "sources={embed.towers: ask the modeller}"]
    assert fail("run", config, *weights).endswith("install it on every node\n    ask the modeller")


def test_a_config_extends_several(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("name: part\nmine: {matched: {pairs: 7}}\ntrain: {seeds: [5]}")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"extends": ["demo", str(tmp_path / "part.yaml")], "name": "own"}))
    loaded = configs.load(str(tmp_path / "own.yaml"), [])
    assert (loaded.name, loaded.train.seeds, loaded.mine.matched.pairs) == ("own", [5], 7)
    assert loaded.mine.part_rows == configs.load("demo", []).mine.part_rows == 4000


def test_a_tower_has_its_own_views(config: str) -> None:
    from cluster.app.graph import Graph

    digests = [
        {stage.instance: stage.digest for stage in Graph(configs.load(config, assignments)).stages}
        for assignments in ([], ["embed.views_for={photo.cat*: {count: 1}}"])
    ]
    changed = {instance for instance in digests[0] if digests[0][instance] != digests[1][instance]}
    assert "embed:photo.catalogue" in changed
    assert "align:vdg" in changed
    assert not {"embed:photo.photos", "embed:photo.evaluate", "mine:photos", "train:supervised.s0"} & changed


def test_excluded_images_are_ingested_and_seen_by_the_mining_tower(config: str, photo_folder: Path, tmp_path: Path) -> None:
    from cluster.app.graph import Graph

    def stages(*assignments: str) -> dict[str, str]:
        return {stage.instance: stage.digest for stage in Graph(configs.load(config, list(assignments))).stages}

    names = f"mine.exclude.cirr.annotations={photo_folder}"
    free, named, seen = stages(), stages(names), stages(names, f"mine.exclude.cirr.images={photo_folder}")
    assert set(named) - set(free) == {"ingest:excluded-cirr", "exclude:photos"}
    assert set(seen) - set(named) == {"embed:photo.excluded-cirr"}
    assert len({digests["mine:photos"] for digests in (free, named, seen)}) == 3
    shown = RUNNER.invoke(app, ["mine", config, "--dry-run", "--set", "mine.exclude.circo={annotations: nowhere}"]).stdout
    assert "ingest:excluded-circo" in shown
    assert "missing mine.exclude.circo.annotations:" in shown


def test_digests_do_not_depend_on_resources(config: str) -> None:
    from cluster.app.graph import Graph

    digests = [
        {stage.instance: stage.digest for stage in Graph(configs.load(config, assignments)).stages}
        for assignments in ([], ["resources.train.workers=4", "resources.embed.gpus=1", "tracking.experiment=x"])
    ]
    assert digests[0] == digests[1]


def test_evaluating_on_another_gallery_leaves_the_models_alone(config: str, photo_folder: Path) -> None:
    from cluster.app.graph import Graph

    before, after = (
        {stage.instance: stage.digest for stage in Graph(configs.load(config, assignments)).stages}
        for assignments in ([], [f"evaluate.images={photo_folder}"])
    )
    changed = {instance for instance in before if before[instance] != after[instance]}
    assert changed == {"ingest:evaluate", "ingest:queries", "embed:photo.evaluate", "evaluate:all"}


def test_init_writes_a_config_that_was_checked_against_the_data(photo_folder: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in photo_folder.iterdir())
    rows = [{"reference": names[i % 24], "target": names[(i % 24) ^ 1], "captions": ["x"]} for i in range(60)]
    triplets = tmp_path / "triplets.json"
    triplets.write_text(json.dumps(rows))
    invoke("init", str(tmp_path / "own"), "--images", str(photo_folder), "--triplets", str(triplets))
    path = tmp_path / "own" / "vdg.yaml"
    loaded = configs.load(str(path), [])
    assert sorted(loaded.train.variants) == ["semi", "supervised", "text_only"]
    assert loaded.ingest.triplets["labelled"].file == [str(tmp_path / "own" / "labelled.json")]
    arguments = ("--images", str(photo_folder), "--triplets", str(triplets))
    assert "already exists" in fail("init", str(tmp_path / "own"), *arguments)
    triplets.write_text(json.dumps([{"reference": "a", "target": "b", "captions": ["x"]}]))
    assert "1 unknown_image; the first: row 0: reference 'a' is not in the gallery" in fail(
        "init", str(tmp_path / "other"), *arguments
    )


@pytest.mark.parametrize("root", ["root", "absolute"])
def test_ls_and_clean_know_what_is_used(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.app.graph import Graph

    monkeypatch.chdir(tmp_path)
    given = f"root={root if root == 'root' else tmp_path / root}"
    graph = Graph(configs.load("grocery", [given]))
    used = graph.output(graph["mine:photos"])
    used.write_bytes("part-00000.parquet", b"x")
    stale = tmp_path / root / "mine" / "photos-000000000000"
    stale.mkdir()
    (stale / "part-00000.parquet").write_bytes(b"x" * 2**20)
    shown = invoke("ls", "grocery", "--set", given)
    assert "1.0 MB" in shown
    assert (shown.count("this config"), shown.count("nothing")) == (1, 1)
    assert "mine:photos-000000000000" in shown
    with lease.hold(Output(str(stale))):
        assert "another driver is at work" in fail("clean", "grocery", "--set", given, "--yes")
    assert "1.0 MB" in invoke("clean", "grocery", "--set", given, "--yes")
    assert not stale.exists()
    assert used.exists("part-00000.parquet")
    assert "nothing to remove" in invoke("clean", "grocery", "--set", given)


def test_clean_spares_what_a_finished_run_refers_to(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.app.graph import Graph

    monkeypatch.chdir(tmp_path)
    other = configs.load("grocery", ["name=other", f"evaluate.images={photo_folder}"])
    Output("outputs/runs/other").write_bytes("config.yaml", yaml.safe_dump(other.model_dump(mode="json")).encode())
    graph = Graph(other)
    graph.output(graph.evaluation).write_bytes("metrics.json", b"{}")
    assert "nothing to remove" in invoke("clean", "grocery", "--yes")
    photo_folder.rename(tmp_path / "moved")
    assert "evaluate.images" in fail("clean", "grocery", "--yes")
    assert graph.output(graph.evaluation).exists("metrics.json")


def test_models_of_an_earlier_run_of_the_same_name_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.app.graph import Graph
    from cluster.app.outputs import keep_models

    monkeypatch.chdir(tmp_path)
    earlier = Graph(configs.load("grocery", ["train.training.steps=123"]))
    model = earlier.output(earlier["train:supervised.s0"])
    model.write_bytes("weights.safetensors", b"x")
    for graph in (earlier, Graph(configs.load("grocery", []))):
        keep_models(Output("outputs/runs/grocery"), graph.stages)
    assert "models of grocery" in invoke("ls", "grocery")
    assert "nothing to remove" in invoke("clean", "grocery", "--yes")
    invoke("clean", "grocery", "--models", "--yes")
    assert not model.exists("weights.safetensors")


def test_what_goes_into_a_pipe_is_not_cut(tmp_path: Path) -> None:
    root = tmp_path / ("long" * 40)
    shown = invoke("run", "grocery", "--dry-run", "--set", f"root={root}")
    assert re.search(r"evaluate/all-[0-9a-f]{12}", shown)
    assert str(root) in shown


def test_a_gallery_indexed_in_place_is_another_one_elsewhere(photo_folder: Path, tmp_path: Path) -> None:
    from cluster.app.graph import Graph

    copy = tmp_path / "copy"
    shutil.copytree(photo_folder, copy)
    for copied, same in ((True, True), (False, False)):
        given = f"ingest.galleries.photos.copy_images={copied}"
        digests = {
            Graph(configs.load("grocery", [given, f"ingest.galleries.photos.images={place}"]))["ingest:photos"].digest
            for place in (photo_folder, copy)
        }
        assert (len(digests) == 1) is same


def test_variants_keep_the_order_of_the_config(config: str) -> None:
    given = ["train.seeds=[0]"]
    assert list(configs.load(config, given).train.variants)[:3] == ["supervised", "semi", "shuffled"]


def test_rounds_of_a_run_are_planned() -> None:
    shown = invoke("run", "grocery", "--dry-run", "--rounds", "2")
    for instance in ("select:vdg.r2", "instruct:vdg.r2", "generate:photos.r2"):
        assert instance in shown
    assert "vdg.r2" not in invoke("run", "grocery", "--dry-run")


def test_a_second_driver_of_the_same_output_is_refused_before_any_work(config: str, tmp_path: Path) -> None:
    from cluster.app.graph import Graph

    graph = Graph(configs.load(config, []))
    with lease.hold(graph.output(graph["ingest:photos"])):
        assert "ingest/photos-" in (message := fail("run", config))
        assert "another driver is at work" in message
    assert not (tmp_path / "root" / "mlflow.db").exists()
