"""Decoding of our own against transformers' `generate`, which computes every prompt whole and keeps every row to the end."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from vdg.backbones.decoding import Decoder
from vdg.config import GenerateConfig

ROWS, COMMON, REST, VOCABULARY, END = 9, 5, 4, 40, 1
SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mistral": {**LLAMA, "sliding_window": 6},  # keys and values of a window only
    "qwen3_next": {**LLAMA, "head_dim": 8, "num_experts": 0, "layer_types": ["linear_attention", "full_attention"]},
}


@pytest.fixture(params=MODELS)
def model(request):
    """A language model that ends its texts early, late or never."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SHAPE, **MODELS[request.param])).eval()


def _prompts(model) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    common = torch.randint(2, VOCABULARY, (1, COMMON), generator=generator)
    width = model.get_input_embeddings().embedding_dim
    return common, torch.randn(ROWS, REST, width, generator=generator) * model.get_input_embeddings().weight.std()


@pytest.mark.parametrize("config", [GenerateConfig(greedy=True), GenerateConfig(temperature=4.0, top_k=30)])
def test_ids_are_those_of_generate(model, config):
    common, rest = _prompts(model)
    embedded = torch.cat([model.get_input_embeddings()(common).expand(ROWS, -1, -1), rest], 1)
    sampling = {} if config.greedy else {"temperature": config.temperature, "top_k": config.top_k}
    decoding = GenerationConfig(
        max_new_tokens=config.max_new_tokens, do_sample=not config.greedy, eos_token_id=END, pad_token_id=END, **sampling
    )
    torch.manual_seed(7)
    with torch.no_grad():
        expected = model.generate(inputs_embeds=embedded, generation_config=decoding)
    ids, scores = Decoder(model, END)(common, rest, config, seed=7)
    assert ids.shape == expected.shape
    lengths = [row.index(END) + 1 if END in row else len(row) for row in expected.tolist()]
    assert [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)] == [
        row[:n] for row, n in zip(expected.tolist(), lengths, strict=True)
    ]
    for row, length in enumerate(lengths):
        spoken = model.get_input_embeddings()(expected[row, : length - 1])
        logits = model(inputs_embeds=torch.cat([embedded[row], spoken])[None]).logits[0, COMMON + REST - 1 :]
        wanted = logits.log_softmax(1).gather(1, expected[row, :length, None])[:, 0]
        torch.testing.assert_close(scores[row, :length], wanted, atol=1e-4, rtol=1e-4)
