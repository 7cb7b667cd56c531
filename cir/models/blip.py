"""BLIP as a model of composed retrieval: its image-grounded text encoder reads the delta with the reference in view."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cir.config import VariantConfig
from cir.losses import Pairs, distinct, draw_negatives, target_delta_matching
from cir.models.retrieval import Retrieval
from mining.config import TowerConfig
from mining.pretrained import source_of, tokenizer_of, tokens_of
from mining.towers import colours, normalised

MAX_LENGTH = 32  # tokens of a delta, as in the paper; longer ones are cut
FIRST_TEMPERATURE = 0.07
TEMPERATURES = (0.001, 0.5)


class BlipRetrieval(Retrieval):
    """Query c = normalise(W_t CLS(text encoder(delta | patches of the reference))), target x = normalise(W_v CLS(ViT(target))).

    (PAPER 3.2.) The text encoder, W_t and the temperature are trained; the ViT, W_v and the matching head are frozen. Images
    come as pixels uint8 [B, size, size, 3].
    """

    def __init__(self, config: VariantConfig, tower: TowerConfig) -> None:
        super().__init__()
        from transformers import BlipForImageTextRetrieval

        assert tower.weights is not None
        self.config, self.tokenizer = config, tokenizer_of(tower.weights)
        self.blip: Any = BlipForImageTextRetrieval.from_pretrained(dtype=torch.float32, **source_of(tower.weights))
        self.blip.requires_grad_(False)
        for trained in (self.blip.text_encoder, self.blip.text_proj):
            trained.requires_grad_(True)
        self.mean, self.std = colours(tower)
        self.temperature = nn.Parameter(torch.tensor([FIRST_TEMPERATURE])) if config.learns_temperature else None

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Tokens int64 [len(texts), length], padded to the longest text and cut at 32."""
        return tokens_of(self.tokenizer, texts, MAX_LENGTH)

    def compose(self, reference: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Queries float32 [B, dim] of norm 1, of pixels and tokens int64 [B, length]."""
        return self._compose(self._patches(reference), text)

    def learned_scale(self) -> torch.Tensor:
        """Of tau clamped to 0.001 ... 0.5."""
        assert self.temperature is not None
        return 1 / self.temperature.float().clamp(*TEMPERATURES).squeeze()

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """As `Retrieval`, with the matching loss where the config has it: L = L_tcc + L_tdm (PAPER 3.3)."""
        text, loss = batch["text"], self.config.loss
        reference, target = self._patches(batch["reference"]), self._patches(batch["target"])
        targets = self._project(target)
        references = self._project(reference) if loss.reference_negative else None
        pairs = Pairs(self._compose(reference, text), targets, batch["target_id"], batch["reference_id"], references)
        losses = self.losses(pairs, batch["supervised"])
        if not loss.tdm:
            return losses
        matching = self._matching(target, targets, text, batch["target_id"])
        return {**losses, "loss": losses["loss"] + matching, "loss_tdm": matching}

    @torch.no_grad()
    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """The frozen ViT's CLS and patch tokens [B, 1 + patches, width]."""
        images = normalised(pixels, self.mean, self.std).to(self.blip.vision_proj.weight.dtype)
        return self.blip.vision_model(pixel_values=images).last_hidden_state

    @torch.no_grad()
    def _project(self, patches: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.blip.vision_proj(patches[:, 0]).float(), dim=-1)

    def _compose(self, patches: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        states = self._read(patches, text, text != self.tokenizer.pad_token_id)
        return functional.normalize(self.blip.text_proj(states[:, 0]).float(), dim=-1)

    def _read(self, patches: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, length, width] of the text, every token of which sees the patches."""
        return self.blip.text_encoder(
            input_ids=text, attention_mask=mask.long(), encoder_hidden_states=patches
        ).last_hidden_state

    def _matching(self, patches: torch.Tensor, targets: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """L_tdm over this rank's rows (PAPER 3.3, Eq. 3).

        With x_i the target and z_i the query composed of target and delta: the negative target of delta i is drawn by
        x_i . z_j, the negative delta of target i by z_i . x_j.
        """
        with torch.no_grad():
            similarities = targets @ self._compose(patches, text).T
            allowed = distinct(ids, text)
            other_targets, other_deltas = draw_negatives(similarities, allowed), draw_negatives(similarities.T, allowed)
        own = torch.arange(len(text), device=text.device)
        images = torch.cat([own, other_targets.clamp(min=0), own])
        deltas = torch.cat([own, own, other_deltas.clamp(min=0)])
        logits = self._match(patches[images], text[deltas]).unflatten(0, (3, -1))
        return target_delta_matching(logits, other_targets, other_deltas)

    def _match(self, patches: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Logits [B, 2] of "do not match" and "match": the head's, averaged over the text's tokens but for CLS, which no
        token sees here."""
        mask = text != self.tokenizer.pad_token_id
        mask[:, 0] = False
        logits = self.blip.itm_head(self._read(patches, text, mask)).float()
        return (logits * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
