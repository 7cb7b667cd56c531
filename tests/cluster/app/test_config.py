"""What a run's config says of the retrieval models and the tower they see through."""

from pathlib import Path

import pytest

from cluster.app import config
from cluster.app.config import RunConfig, load, read_config
from cluster.app.graph import Graph
from cluster.app.sources import Sources
from cluster.config import validate
from cluster.errors import UserError

TOWER = (
    "{library: transformers, model: blip, weights: {hub: Salesforce/blip-itm-large-coco}, output: projected, "
    "image_size: 384, resize: squash}"
)
FUSIONS = ("text_only", "image_only")  # variants of the preset that zero an input of a fusion


def blip(*assignments: str) -> RunConfig:
    """The bundled preset with BLIP as its retrieval model."""
    others = [f"train.{name}=null" for name in ("text", "image_hidden", "temperature", *(f"variants.{v}" for v in FUSIONS))]
    return load(
        "grocery",
        [f"embed.towers.blip={TOWER}", "train.tower=blip", "train.model=blip", "train.center=false", *others, *assignments],
    )


def test_blip_takes_pixels_of_every_gallery_it_is_trained_on() -> None:
    seen = Sources(blip()).seen("blip", "photos", "catalogue", pixels=True)
    assert [stage.instance for stage in seen["embeddings"]] == ["embed:blip.photos", "embed:blip.catalogue"]
    assert [stage.instance for stage in seen["galleries"]] == ["ingest:photos", "ingest:catalogue"]
    assert Sources(blip()).seen("blip", "photos")["galleries"] == ()
    assert "embed:blip.photos" in {stage.instance for stage in Graph(blip()).stages}


def test_blip_needs_a_projected_tower() -> None:
    with pytest.raises(UserError, match=r"model 'blip' needs a train.tower with output: projected.*'photo' has output: pooled"):
        blip("train.tower=photo")


@pytest.mark.parametrize(("extends", "said"), [("a.yaml", "comes back to itself"), ("5", "found 5"), ("null", "found None")])
def test_what_a_config_extends(extends: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(f"extends: {extends}")
    with pytest.raises(UserError, match=said):
        read_config("a.yaml")


def test_a_preset_names_the_bundled_photos_alone_or_in_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "PRESETS", tmp_path)
    (tmp_path / "shop.yaml").write_text('images: "{project}/a"\nfile: ["{project}/b.json", c.json]')
    assert read_config("shop") == {"images": f"{config.PROJECT}/a", "file": [f"{config.PROJECT}/b.json", "c.json"]}


@pytest.mark.parametrize(
    "assignment",
    [
        "train.training.betas=[-1, 0.99]",
        "train.training.betas=[0.9, 1]",
        "train.training.learning_rate=.inf",
        "train.seeds=[-1]",
        "train.seeds=[0, 0]",
        "report.seed=-1",
        "rounds.selection.seed=-1",
        "rounds.count=1000000",
        "evaluate.folds=1000000",
        "evaluate.recalls=[0]",
        "evaluate.subset_recalls=[-1]",
        "embed.views.crop=[0.9, 0.5]",
        "embed.views.crop=[0, 1]",
        "embed.views.crop=[0.5, 2]",
        "embed.views.aspect=[2, 1]",
        "embed.views.aspect=[-1, 1]",
        "embed.towers.photo.std=[0.2, 0.2, 0]",
    ],
)
def test_numbers_that_mean_nothing_are_refused(assignment: str) -> None:
    field = assignment.partition("=")[0]
    with pytest.raises(UserError, match=rf"{field.rpartition('.')[0]}(.|\n)*{field.rpartition('.')[2]}"):
        load("grocery", [assignment])


@pytest.mark.parametrize("name", ["../../../evil", "", "a/b", "a b", ".", "a\n", "a" * 65])
def test_names_of_folders_are_checked(name: str) -> None:
    content = read_config("demo")
    tower = next(iter(content["embed"]["towers"].values()))
    with pytest.raises(UserError, match=r"embed\.towers: .* is part of a folder's name"):
        validate(
            RunConfig, content | {"embed": {**content["embed"], "towers": {**content["embed"]["towers"], name: tower}}}, "x"
        )
    with pytest.raises(UserError, match="vdg"):
        validate(RunConfig, content | {"vdg": {**content["vdg"], "tower": ""}}, "x")


@pytest.mark.parametrize("uri", ["", "sqlite:///", "sqlite://", "sqlite:///:memory:"])
def test_records_that_would_be_lost_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri.*keeps no record after the run"):
        load("grocery", [f"tracking.uri={uri!r}"])
