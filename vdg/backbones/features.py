"""The paper's backbone: frozen image features, one trained projection, any causal language model with LoRA.

The features are those of an image tower: InstructBLIP's 32 queries (the paper's), patch tokens, or one pooled vector.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mining.features import centred
from vdg.backbones.base import Batch
from vdg.backbones.decoding import Decoder
from vdg.backbones.language import LanguageBackbone, collate, with_lora
from vdg.config import GenerateConfig, VdgConfig
from vdg.description import Description
from vdg.language import load_language_model, load_tokenizer
from vdg.prompts import IMAGE, INSTRUCTIONS, answer_ids, caption_prompt, pair_prompt


class FeatureInputs:
    """Batches of `ids` int64 [B, T], with IMAGE where an image embedding goes, and `features` float32.

    Features are [B, images, tokens, dim], in the order of their places; answers are cut to `max_tokens`.
    """

    def __init__(self, description: Description, mean: np.ndarray, max_tokens: int) -> None:
        """`mean` float32 [dim]: of the training gallery's features."""
        assert description.tokens is not None
        self.vdg, self.mean, self.max_tokens = description.vdg, mean, max_tokens
        self._slots = description.tokens * self.vdg.tokens_per_feature

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.vdg.language)

    @cached_property
    def _pair_prompt(self) -> list[int]:
        return pair_prompt(self._tokenizer, self.vdg.prompt, self._slots)

    @cached_property
    def _caption_prompts(self) -> list[list[int]]:
        return [caption_prompt(self._tokenizer, self.vdg.prompt, self._slots, text) for text in INSTRUCTIONS]

    def pairs(self, references: np.ndarray, targets: np.ndarray, deltas: Sequence[str] | None = None) -> Batch:
        """Two-image prompts of features [B, tokens, dim], with `targets` where there are deltas to learn."""
        features = torch.stack([prepare(values, self.mean, self.vdg) for values in (references, targets)], 1)
        if deltas is None:
            return {"features": features, "ids": torch.tensor([self._pair_prompt] * len(features))}
        return {"features": features, **collate([self._pair_prompt] * len(deltas), self._answers(deltas))}

    def captions(self, images: np.ndarray, instructions: np.ndarray, captions: Sequence[str]) -> Batch:
        """One-image prompts of features [B, tokens, dim], instructions by their place in INSTRUCTIONS, and the captions."""
        prompts = [self._caption_prompts[place] for place in instructions]
        features = prepare(images, self.mean, self.vdg).unsqueeze(1)
        return {"features": features, **collate(prompts, self._answers(captions))}

    def _answers(self, texts: Sequence[str]) -> list[list[int]]:
        return [answer_ids(self._tokenizer, text, self.max_tokens) for text in texts]


def prepare(values: np.ndarray, mean: np.ndarray, vdg: VdgConfig) -> Tensor:
    """The projection's input float32 from raw features [..., dim]: centred to norm sqrt(dim) if the config says so."""
    if vdg.center:
        values = centred(values, mean) * np.sqrt(values.shape[-1], dtype=np.float32)
    return torch.from_numpy(values)


class FeatureBackbone(LanguageBackbone):
    """Every image token of width `dim` becomes `tokens_per_feature` language-model embeddings (paper, section 3.1).

    `align` trains the projection alone, `instruct` the projection and LoRA.
    """

    def __init__(self, description: Description, dtype: torch.dtype = torch.float32, partitioned: bool = False) -> None:
        """`dtype` and `partitioned` (over the ranks, for ZeRO-3) are the frozen language model's."""
        config = description.vdg
        assert description.dim is not None
        frozen: Any = load_language_model(config.language, dtype, partitioned)
        width = frozen.get_input_embeddings().embedding_dim
        instruct = description.stage == "instruct"
        model = with_lora(frozen, config, list(config.lora_targets)) if instruct else frozen
        super().__init__(config, load_tokenizer(config.language), model)
        out = config.tokens_per_feature * width
        self.projection: nn.Module = (
            nn.Linear(description.dim, out, bias=False)  # the paper's
            if config.projection == "linear"
            else nn.Sequential(nn.Linear(description.dim, width), nn.GELU(), nn.Linear(width, out))  # LLaVA's
        )

    @classmethod
    def inputs(cls, description: Description, mean: np.ndarray | None, max_tokens: int) -> FeatureInputs:
        """Prompts with a place for each image embedding."""
        assert mean is not None
        return FeatureInputs(description, mean, max_tokens)

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings; padding is on the right, so causal attention needs no mask and positions count from 0."""
        return {"inputs_embeds": self.embed(batch["ids"], batch["features"])}

    def decode(self, batch: Batch, config: GenerateConfig, seed: int) -> tuple[Tensor, Tensor]:
        """By a decoder of our own: all prompts are of one length, and begin alike."""
        ids, device = batch["ids"], self.language_model.device
        begin = int(((ids == ids[:1]).all(0) & (ids[0] != IMAGE)).int().cumprod(0).sum())
        rest = self.embed(ids[:, begin:].to(device), batch["features"].to(device))
        return self._decoder(ids[:1, :begin].to(device), rest, config, seed)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.language_model, self.tokenizer.eos_token_id)

    def merge(self) -> None:
        """As for any backbone."""
        super().merge()
        self.__dict__.pop("_decoder", None)  # it holds the model, as it was

    def embed(self, ids: Tensor, features: Tensor) -> Tensor:
        """Embeddings [B, T, width] of ids [B, T], the projected features [B, images, tokens, dim] in the IMAGE slots."""
        embeddings = self.language_model.get_input_embeddings()(ids.clamp(min=0))
        features = functional.dropout(features.to(embeddings.dtype), self.config.feature_dropout, self.training)
        return embeddings.masked_scatter((ids == IMAGE).unsqueeze(-1), self.projection(features).to(embeddings.dtype))
