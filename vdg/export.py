"""A trained generator as files that load elsewhere: its LoRA for PEFT, its projection, or a whole chooser, as safetensors."""

from pathlib import Path
from typing import Any

from cluster.artifacts import Output
from cluster.training.checkpoints import WEIGHTS
from mining.embeddings import MEAN
from vdg.description import DESCRIPTION, Description, read_description

LORA = "language_model."  # where the language model with its LoRA is in a backbone
PROJECTION = "projection."


def export_generator(model: Output, folder: Path) -> list[str]:
    """Write a PEFT adapter folder, the projection and the description, or a chooser. Returns notes on what loads how.

    Raises UserError when `model` holds no generator.
    """
    description = read_description(model)
    for name in filter(model.exists, (DESCRIPTION, MEAN)):
        (folder / name).write_bytes(model.read_bytes(name))
    if description.vdg.backbone == "chooser":
        (folder / WEIGHTS).write_bytes(model.read_bytes(WEIGHTS))
        return [f"{WEIGHTS} chooses among the {len(description.texts)} texts of {DESCRIPTION}; that needs this package."]
    return _language_model(model, description, folder)


def _language_model(model: Output, description: Description, folder: Path) -> list[str]:
    from safetensors.torch import load, save_file

    weights = load(model.read_bytes(WEIGHTS))
    lora = {name.removeprefix(LORA).replace(".default.", "."): w for name, w in weights.items() if name.startswith(LORA)}
    save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _adapter_config(description, list(lora)).save_pretrained(str(folder))
    projection = {name.removeprefix(PROJECTION): w for name, w in weights.items() if name.startswith(PROJECTION)}
    if projection:
        save_file(projection, folder / "projection.safetensors")
    return _notes(description)


def _adapter_config(description: Description, names: list[str]) -> Any:
    """The layers are named in full, so that layers of an image tower that are named alike stay as they are."""
    from vdg.backbones.language import lora_config

    layers = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names})
    config = lora_config(description.vdg, layers)
    config.inference_mode = True
    config.base_model_name_or_path = description.vdg.language.location()
    return config


def _notes(description: Description) -> list[str]:
    base = description.vdg.language.location()
    notes = [f"The LoRA loads with PEFT alone: `PeftModel.from_pretrained(base, FOLDER)`, `base` being {base}."]
    if base.endswith(".gguf"):
        notes.append("The base is a GGUF file: give transformers its folder and `gguf_file`, and de-quantise it.")
    if description.vdg.backbone == "features":
        notes.append(
            f"projection.safetensors is a {description.vdg.projection} projection of features {description.dim} wide; "
            f"{MEAN} is the mean that centres them. Prompts with image slots need this package."
        )
    else:
        notes.append("Prompts with both images and the clean-up of the texts need this package.")
    return notes
