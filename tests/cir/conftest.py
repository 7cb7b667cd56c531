"""A tiny CLIP of the real class."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An open_clip tower of width 16 with a checkpoint, as a config section."""
    import json

    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    shape: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    Path(folder / "tiny-clip.json").write_text(json.dumps(shape))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "clip.pt")
    return {"library": "open_clip", "model": "tiny-clip", "weights": {"folder": str(folder), "file": "clip.pt"}}
