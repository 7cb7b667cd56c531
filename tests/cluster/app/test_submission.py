"""What a submission is made of: the command, the config as text, and what is refused before anything is sent."""

from pathlib import Path

import pytest

from cluster.app import config as configs
from cluster.app.graph import Graph
from cluster.app.submission import prepare
from cluster.errors import UserError


def test_a_whole_run_and_its_config_as_text(tmp_path: Path) -> None:
    job, paths = prepare("grocery", [f"root={tmp_path}", "resources.ray.num_cpus=2"], None, "mine", True, {"HF_HOME": "/hf"})
    assert job.entrypoint == "python -m cluster.app run config.yaml --until mine"
    assert job.base.startswith("grocery-")
    assert job.environment == {"HF_HOME": "/hf"}
    assert paths["root"] == str(tmp_path)
    assert "evaluate.images" in paths
    (tmp_path / "config.yaml").write_text(job.config)
    sent = configs.load(str(tmp_path / "config.yaml"), [])
    assert sent.resources.ray.num_cpus is None
    before = Graph(configs.load("grocery", [f"root={tmp_path}"]))
    assert [s.digest for s in Graph(sent).stages] == [s.digest for s in before.stages]


def test_the_id_names_what_is_asked_for() -> None:
    def base(*assignments: str, only: str | None = None) -> str:
        return prepare("grocery", list(assignments), only, None, True, {})[0].base

    assert base() == base("resources.train.workers=2")
    assert base() != base("train.hidden=4")
    assert base() != base(only="train:semi.*")


def test_stages_of_one_kind() -> None:
    job, _ = prepare("grocery", [], "train:semi.*", None, True, {})
    assert job.entrypoint == "python -m cluster.app train config.yaml --only 'train:semi.*'"
    assert prepare("grocery", [], "evaluate:all", None, True, {})[0].entrypoint.endswith("evaluate config.yaml")
    with pytest.raises(UserError, match="begin with a stage"):
        prepare("grocery", [], "*.s0", None, True, {})


def test_outputs_are_named_only_when_all_that_decides_their_digests_is_here(tmp_path: Path) -> None:
    def outputs(*assignments: str) -> tuple[str, ...]:
        return prepare("grocery", [f"root={tmp_path}", *assignments], None, None, True, {})[0].outputs

    assert all(uri.startswith(f"{tmp_path}/") for uri in outputs())
    assert outputs("evaluate.images=/only/there") == ()
    folder = "vdg.language_model={folder: /only/there}"
    assert outputs(folder.replace("/only/there", str(tmp_path)))
    assert outputs(folder) == ()


def test_a_source_that_only_the_cluster_reaches_is_no_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(uri: str) -> None:
        raise OSError(f"AWS Error ACCESS_DENIED: {uri}")

    monkeypatch.setattr("cluster.stage.fingerprint", out_of_reach)
    job, paths = prepare("grocery", ["root=/shared", "evaluate.images=s3://photos"], "ingest:evaluate", None, True, {})
    assert paths["evaluate.images"] == "s3://photos"
    assert job.outputs == ()


def test_a_remote_cluster_does_not_have_the_photos_of_this_checkout() -> None:
    with pytest.raises(UserError, match=r"(?s)--local.*root: outputs is relative") as error:
        prepare("grocery", [], None, None, False, {})
    for field in ("ingest.galleries.photos.images", "ingest.triplets.labelled.file", "evaluate.attributes"):
        assert f"{field}: " in str(error.value)


def test_no_path_of_the_config_carries_a_password() -> None:
    with pytest.raises(UserError, match=r"1 secret\(s\)(?s:.*)evaluate.images: holds a URI with a password"):
        prepare("grocery", ["evaluate.images=s3://AKIA:secret@photos"], None, "ingest", True, {})


def test_a_relative_weights_folder_is_named(tmp_path: Path) -> None:
    given = [f"vdg.language_model.{name}=null" for name in ("package", "file", "sha256")]
    with pytest.raises(UserError, match=r"vdg.language_model.folder: llama is relative"):
        prepare("grocery", ["vdg.language_model.folder=llama", *given], None, None, True, {})
