"""The Python of docs/extending.md, run as if it stood in the files that it names."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchvision.models import resnet18

from cir.benchmarks.official import OFFICIAL, Annotations
from cir.config import LossConfig, VariantConfig
from cir.losses import CONTRASTIVE, Pairs, negatives, semi_supervised
from cir.models import composed
from cir.select import SCORERS, Pseudo
from cluster.monitor import Monitor
from cluster.stage import Stage
from mining import tables, towers
from mining.config import TowerConfig
from mining.texts import load_text_encoder
from tests import tiny
from tests.cir import world
from tests.cir.benchmarks import official
from vdg import backbones
from vdg.backbones.language import collate
from vdg.config import VdgConfig
from vdg.prompts import answer_ids, pair_prompt

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def _registered_for_one_test() -> Iterator[None]:
    registries: list[dict[str, Any]] = [towers.LIBRARIES, backbones.BACKBONES, composed.FUSIONS, OFFICIAL, SCORERS, CONTRASTIVE]
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


def run(heading: str) -> dict[str, Any]:
    """The names that a section's blocks define; a block sees those of the blocks before it, and its file's own."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert section
    defined: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL):
        path = Path(block.split("\n", 1)[0].removeprefix("# "))
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        there = vars(importlib.import_module(name)) if (PAGE.parents[1] / path).is_file() else {}
        names = {**there, **defined, "__name__": "__main__"}  # not a module that dataclasses would look up
        exec(compile(block, str(path), "exec"), names)
        defined |= {key: value for key, value in names.items() if key not in there}
    assert defined
    return defined


def test_a_stage(tmp_path: Path) -> None:

    class Mined(Stage):
        """Three pairs of one reference and one of another."""

        def work(self, output: Any, run: Any) -> None:
            row = {"group_id": None, "reference_rank": None, "target_rank": None}
            found = [(0, 7, 0.5), (1, 7, 0.9), (2, 7, 0.7), (3, 8, 0.1)]
            rows = [{**row, "pair_id": i, "reference_id": r, "target_id": i, "similarity": s} for i, r, s in found]
            output.write_table("part-00000.parquet", pa.Table.from_pylist(rows, tables.PAIRS), tables.PAIRS)

    thin, mined = run("A stage")["Thin"], Mined(name="photos")
    mined.run(str(tmp_path), Monitor())
    made = {most: thin(name="photos", pairs=mined, most=most) for most in (1, 2)}
    assert made[1].instance == "thin:photos"
    assert made[1].digest != made[2].digest
    manifest = made[2].run(str(tmp_path), Monitor())
    assert manifest["parents"] == {"pairs": {"instance": "mined:photos", "digest": mined.digest}}
    assert made[2].output(str(tmp_path)).read_parts(tables.PAIRS)["pair_id"].to_pylist() == [1, 2, 3]
    assert made[2].run(str(tmp_path), Monitor()) == manifest


def test_a_tower_library(tmp_path: Path) -> None:
    run("A tower library")
    torch.manual_seed(0)
    model = resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    weights = {"folder": str(tmp_path), "file": "w.pt"}
    config = TowerConfig.model_validate({"library": "timm", "model": "resnet18", "image_size": 64, "weights": weights})
    tower = towers.ImageTower(config.model_copy(update={"library": "torchvision", "precision": "fp32"}))
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    model.fc = torch.nn.Identity()
    expected = model(towers.normalised(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(tower(pixels)[:, 0].cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_generator_backbone(tmp_path: Path) -> None:
    run("A generator backbone")
    config = VdgConfig(language_model=tiny.language_model(tmp_path), lora_rank=4).model_copy(update={"backbone": "mean"})
    description = backbones.Description.model_construct(stage="instruct", vdg=config, tokens=4, dim=8)
    generator = backbones.build(description).eval()
    prompt = pair_prompt(generator.tokenizer, config.prompt, 4 * config.tokens_per_feature)
    batch = collate([prompt], [answer_ids(generator.tokenizer, "red", 8)])
    features = torch.randn(1, 2, 4, 8)
    losses = [generator({**batch, "features": values})["loss"] for values in (features, features.flip(2), features.flip(1))]
    torch.testing.assert_close(losses[0], losses[1])
    assert abs(losses[0] - losses[2]) > 1e-5
    inputs = backbones.make_inputs(description, torch.zeros(8).numpy())
    assert len(inputs.pairs(features[:, 0].numpy(), features[:, 1].numpy())["ids"]) == 1


def test_a_retrieval_model(tmp_path: Path) -> None:
    run("A retrieval model")
    config: VariantConfig = world.variant(tiny.text_tower(tmp_path)).model_copy(update={"fusion": "gated"})
    assert config.text is not None
    model = composed.ComposedRetrieval(config, 16, load_text_encoder(config.text))
    images, texts = torch.randn(4, 16), model.tokenize(["red", "green", "a ring", "in blue"])
    torch.testing.assert_close(model.compose(images, texts).norm(dim=-1), torch.ones(4))
    ids = torch.arange(4)
    batch = {"reference": images, "target": images.roll(1, 0), "reference_id": ids, "target_id": ids.roll(1), "text": texts}
    losses = model({**batch, "supervised": 4})
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.fusion.parameters())


def test_a_loss() -> None:
    loss = run("A loss")["hardest"]
    torch.manual_seed(0)
    queries, targets = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1)
    pairs = Pairs(queries, targets, torch.arange(6), torch.arange(6) + 10)
    scale, config = torch.tensor(10.0, requires_grad=True), LossConfig(contrastive="hn_nce")
    value = loss(pairs, scale, config)
    margins = negatives(pairs, scale, None)[0].margins
    others = margins.masked_fill(torch.eye(6, dtype=torch.bool), -1000)
    torch.testing.assert_close(value, (1 + others.exp().amax(1)).log().mean())
    semi_supervised(pairs, 4, scale, config.model_copy(update={"contrastive": "hardest"}))["loss"].backward()
    assert scale.grad is not None


@pytest.mark.usefixtures("ray_session")
def test_a_benchmark(tmp_path: Path) -> None:
    run("A benchmark")
    images = [f"photo{i}" for i in range(12)]
    rows = [{"reference": images[i], "text": "in red", "target": images[i + 1]} for i in range(3)]
    (tmp_path / "images.json").write_text(json.dumps(images))
    (tmp_path / "queries.json").write_text(json.dumps(rows))
    files = Annotations("evaluate.annotations", str(tmp_path), benchmark="shop", part="val")
    shop = files.load()
    assert official.means(official.score(tmp_path / "right", shop, official.of_targets)) == {"R@1": 100, "R@5": 100}
    copied = official.means(official.score(tmp_path / "copied", shop, official.of_references))
    assert copied["R@1"] < 100
    assert set(files.names()) == set(images)


def test_a_scorer(tmp_path: Path) -> None:
    run("A scorer")
    rows = world.triplet_rows(6, 0)
    for row, words in zip(rows, ("a b c", "a", "a b", "a b c d", "a", "x y"), strict=True):
        row["deltas"] = [words]
    pseudo, ids = Pseudo(world.triplets(tmp_path, rows)), np.array([row["triplet_id"] for row in rows])
    assert pseudo.scores(ids, ["brevity"]).tolist() == [-3, -1, -2, -4, -1, -2]
