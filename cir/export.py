"""A trained composed-retrieval model as plain safetensors and JSON."""

from pathlib import Path

from cir.train import MODEL, RESULT
from cluster.artifacts import Output
from cluster.training.checkpoints import WEIGHTS
from mining.embeddings import MEAN

TEXT = "text.tower."  # where a trained text tower is in the model


def export_model(model: Output, folder: Path) -> list[str]:
    """Write the trained weights, what builds the model, and a trained text tower by itself. Returns notes on what loads how."""
    from safetensors.torch import load, save_file

    for name in filter(model.exists, (WEIGHTS, MODEL, RESULT, MEAN)):
        (folder / name).write_bytes(model.read_bytes(name))
    weights = load(model.read_bytes(WEIGHTS))
    tower = {name.removeprefix(TEXT): weight for name, weight in weights.items() if name.startswith(TEXT)}
    notes = [
        f"{WEIGHTS} are the trained weights alone, {MODEL} says what they belong to: composing queries needs this package."
    ]
    if tower:
        save_file(tower, folder / "text_tower.safetensors", metadata={"format": "pt"})
        notes.append(
            "text_tower.safetensors is the trained text tower under its library's own names: `load_state_dict` of the text "
            f"tower that {MODEL} names, of open_clip (`.text`, cut to max_length positions) or of transformers, takes it."
        )
    return notes
