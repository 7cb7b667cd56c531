"""A trained model in a folder of its own, with its card."""

import json
from pathlib import Path

from cir.evaluate import METRICS
from cir.export import export_model
from cir.train import ModelName
from cluster.app.outputs import run_configs
from cluster.config import content_of
from cluster.driver.lineage import Lineage, Made, problems
from cluster.errors import UserError
from cluster.training.loop import TRAINING
from mining.config import TowerConfig
from vdg.export import export_generator

EXPORTS = {"instruct": export_generator, "train": export_model}
TOWER = "tower.json"  # the image tower that an exported retrieval model sees through, and its weights
USES = {
    "instruct": "writes what turns a reference image into a target image, to make training triplets. Its texts are drafts: "
    "they may name what is in neither image, and carry over what the language model and the labelled triplets are biased to.",
    "train": "ranks a gallery by a reference image and a text that says what should change. It was trained for images like "
    "those below; measure it before it serves others, and let it decide nothing about people.",
}


def export(lineage: Lineage, made: Made, folder: Path) -> list[str]:
    """Write a finished model and its README.md into a new folder. Returns notes on what loads without this package.

    Raises UserError when it is no generator or retrieval model, when its files differ from the manifest, or when the
    folder has files.
    """
    kind = made.instance.partition(":")[0]
    if kind not in EXPORTS:
        raise UserError(f"{made.name}: is no model to export; give the name of an output of instruct or train")
    if found := problems(made):
        raise UserError(f"{found[0]}; a model that is not the one that was trained is not exported")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is not an empty folder; give a new one")
    folder.mkdir(parents=True, exist_ok=True)
    notes = EXPORTS[kind](made.output, folder)
    if kind == "train":
        notes += _with_tower(lineage, made, folder)
    (folder / "README.md").write_text(card(lineage, made, notes, folder))
    return notes


def tower_of(lineage: Lineage, made: Made) -> TowerConfig | None:
    """The tower whose embeddings a retrieval model was trained on.

    A manifest says what its weights are, and the config of a run below the same root where they are: None without such a run.
    """
    manifests = [near.manifest for role, near in lineage.above(made) if role.startswith("embeddings") and near.manifest]
    wanted = [manifest["settings"]["tower"] for manifest in manifests if "tower" in manifest["settings"]]
    towers = (tower for config in run_configs(lineage.root) for tower in config.embed.towers.values())
    return next((tower for tower in towers if content_of(tower) in wanted), None)


def _with_tower(lineage: Lineage, made: Made, folder: Path) -> list[str]:
    tower = tower_of(lineage, made)
    if tower is None:
        return ["The config of the run is gone, which says where the image tower's weights are: `load_model` needs it."]
    (folder / TOWER).write_text(tower.model_dump_json(indent=1))
    where = tower.weights.model_dump(mode="json", exclude_none=True) if tower.weights else "none"
    return [f"{TOWER} names the image tower, {tower.library}'s {tower.model}, and its weights: {where}."]


def _snippet(folder: Path) -> str:
    return f"""```python
from PIL import Image
from cluster.app.api import load_model

model = load_model({folder.name!r})  # this folder, from the one it is in
query = model.query(Image.new("RGB", (224, 224), "red"), "the same in green")
gallery = model.images([Image.new("RGB", (224, 224), colour) for colour in ("green", "blue")])
print(gallery @ query)  # a score for each image, higher is closer
```"""


def _recalls(lineage: Lineage, made: Made) -> list[str]:
    """What every evaluation of this model that is finished says of it."""
    lines = []
    variant = made.instance.partition(":")[2].partition(".")[0]
    for role, near in lineage.below(made):
        if near.manifest is None or not role.startswith("models.") or not near.output.exists(METRICS):
            continue
        models = [r.removeprefix("models.") for r in lineage.parents[near.name] if r.startswith(f"models.{variant}.")]
        place = sorted(models, key=ModelName.parse).index(role.removeprefix("models."))
        row = near.output.read_json(METRICS).get(variant, {})
        lines += [f"{metric}: {value['seeds'][place]:.1f} ({near.name})" for metric, value in row.items()]
    return lines


def card(lineage: Lineage, made: Made, notes: list[str], folder: Path) -> str:
    """The model card: data, training, metrics, parents by digest, licence, use, loading."""
    assert made.manifest is not None
    ancestors = [near for near in lineage.ancestors(made).values() if near is not made]
    data = [near for near in ancestors if near.instance.startswith("ingest:")]
    metrics = made.output.read_json(TRAINING).get("best", {})  # older trainings name none
    settings = json.dumps(made.manifest["settings"], indent=1)
    said = {near.name: near.manifest["sources"] if near.manifest else {} for near in data}
    sources = {name: ", ".join(f"{field} ({digest})" for field, digest in found.items()) for name, found in said.items()}
    sections = {
        "Use and limits": f"This model {USES[made.instance.partition(':')[0]]}",
        "Loading": _list(notes) + (f"\n\n{_snippet(folder)}" if (folder / TOWER).exists() else ""),
        "Data": _list([f"{near.name}: {near.rows}, sources {sources[near.name] or 'none'}" for near in data]),
        "Made from": _list([f"{near.name}" for near in ancestors if near not in data]),
        "Metrics": "At the step whose weights are kept:\n\n" + _list([f"{name}: {value:g}" for name, value in metrics.items()]),
        "Evaluation": _list(_recalls(lineage, made)),
        "Licence": "The manifests name no licence. Those of the data above and of the pretrained weights in the settings hold "
        "for this model too: look them up before passing it on.",
        "Settings": f"```json\n{settings}\n```",
    }
    code = made.manifest.get("code", {})
    origin = f"code version {code.get('version', 'unknown')}, commit {code.get('commit', 'unknown')}"
    head = f"# {made.instance}\n\nDigest `{made.digest}`, {origin}."
    return "\n\n".join([head, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- none"
