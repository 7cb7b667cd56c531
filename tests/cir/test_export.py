"""An exported text tower loads with its own library alone."""

from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from cir.compose import load_cir
from cir.export import export_model
from tests.cir import world
from tests.cir.test_train import Trainer, trainer  # noqa: F401

TRAINING = {"steps": 5, "batch_size": 16, "learning_rate": 1e-3}
TEXTS = ["in red", "the same in a blue box, please"]


def test_a_tower_of_transformers(trainer: Trainer, tiny_bert: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    output = trainer(world.variant({**tiny_bert, "trained": True}, training=TRAINING))
    export_model(output, tmp_path)
    tower = AutoModel.from_pretrained(tiny_bert["weights"]["folder"], add_pooling_layer=False)
    tower.load_state_dict(load_file(tmp_path / "text_tower.safetensors"))
    ours = load_cir(output).text
    assert ours is not None
    tokens = ours.tokenize(TEXTS)
    with torch.no_grad():
        states = tower(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
        mask = (tokens != 0).unsqueeze(-1)
        torch.testing.assert_close((states * mask).sum(1) / mask.sum(1), ours(tokens))


def test_a_tower_of_open_clip(trainer: Trainer, tiny_clip: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    changes = {"fusion": "combiner", "hidden": None, "center": False}
    output = trainer(world.variant({**tiny_clip, "trained": True}, training=TRAINING, **changes))
    export_model(output, tmp_path)
    ours = load_cir(output).text
    assert ours is not None
    tokens = ours.tokenize(TEXTS)
    tower = open_clip.create_model(tiny_clip["model"], force_custom_text=True).text
    weights = load_file(tmp_path / "text_tower.safetensors")
    length = len(weights["positional_embedding"])
    tower.positional_embedding = torch.nn.Parameter(tower.positional_embedding[:length].detach())
    tower.attn_mask = tower.attn_mask[:length, :length]
    tower.num_pos = tower.context_length = length
    tower.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(tower.eval()(tokens), ours(tokens))
