"""An exported generator, loaded by PEFT alone."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from cluster.artifacts import Output
from cluster.training.checkpoints import WEIGHTS
from mining.features import copy_mean
from tests.stages import centred_by_own
from vdg.backbones import build
from vdg.description import DESCRIPTION, describe
from vdg.export import export_generator


def test_the_lora_loads_with_peft_alone(embeddings, vdg, language_model, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, folder = Output(str(tmp_path / "model")), tmp_path / "exported"
    folder.mkdir()
    description = describe("instruct", centred_by_own(embeddings), vdg())
    generator = build(description).eval()
    for name, parameter in generator.named_parameters():
        if "lora_B" in name:  # zero at the start: it would hide a LoRA that is not loaded
            torch.nn.init.normal_(parameter)
    trained = {name: p.detach() for name, p in generator.named_parameters() if p.requires_grad}
    model.write_bytes(WEIGHTS, save(trained))
    model.write_json(DESCRIPTION, description.model_dump(mode="json"))
    copy_mean(centred_by_own(embeddings), model)

    notes = export_generator(model, folder)
    base = AutoModelForCausalLM.from_pretrained(language_model.location())
    ids = torch.arange(1, 9).unsqueeze(0)
    with torch.no_grad():
        plain = base(ids).logits
        loaded = PeftModel.from_pretrained(base, str(folder)).eval()(ids).logits
        expected = generator.language_model(ids).logits
    torch.testing.assert_close(loaded, expected)
    assert not torch.allclose(loaded, plain)
    projection = load_file(folder / "projection.safetensors")
    torch.testing.assert_close(projection["weight"], generator.projection.weight)
    assert any("needs this package" in note or "need this package" in note for note in notes)
