"""Text encoders of open_clip and transformers behind one call: tokens to vectors."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch
from torch import nn

from cluster.config import content_of
from cluster.devices import device
from cluster.errors import UserError
from cluster.manifest import digest_of
from cluster.weights import Weights
from mining.config import TextTower
from mining.pretrained import check_model, config_of, source_of, tokenizer_of, tokens_of
from mining.scratch import shared
from mining.towers import open_clip_config, open_clip_source

ENCODE_BATCH = 256


class TextEncoder(nn.Module):
    """A text encoder: tokens int64 [B, length] to features float [B, width], not normalised."""

    width: int

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Tokens int64 [len(texts), length], cut at the tower's max_length."""
        raise NotImplementedError


class OpenClipText(TextEncoder):
    """The text side of any open_clip model."""

    def __init__(self, tower: TextTower) -> None:
        import open_clip

        super().__init__()
        name, checkpoint = open_clip_source(tower.model or "", tower.weights)
        pretrained = checkpoint or tower.pretrained
        self.tower = open_clip.create_model(name, pretrained=pretrained, force_custom_text=True, weights_only=True).text
        self.width = self.tower.output_dim
        context = getattr(self.tower, "context_length", tower.max_length)
        if tower.max_length < context:
            _shorten(self.tower, tower.max_length)
        self.tokenizer = open_clip.get_tokenizer(name, context_length=min(tower.max_length, context))
        _split_special_tokens(self.tokenizer)

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """All texts padded to the context's length, as the tower's pooling expects."""
        return self.tokenizer(texts)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [B, width], as the library's `encode_text` gives them."""
        return self.tower(tokens)


def _split_special_tokens(tokenizer: Any) -> None:
    """What looks like a special token in a text is text as well: pooling takes the last place for the end's."""
    if hasattr(tokenizer, "pat"):  # open_clip's own, whose pattern begins with its special tokens
        special = "|".join(token for token in tokenizer.encoder if tokenizer.encoder[token] in tokenizer.all_special_ids)
        tokenizer.pat = regex.compile(tokenizer.pat.pattern.removeprefix(f"{special}|"), tokenizer.pat.flags)
    else:
        tokenizer.tokenizer.split_special_tokens = True


def _shorten(tower: Any, length: int) -> None:
    """Drop the positions after `length`: they are never read, and attention over them costs time."""
    tower.positional_embedding = nn.Parameter(tower.positional_embedding[:length].detach().clone())
    if tower.attn_mask is not None:
        tower.attn_mask = tower.attn_mask[:length, :length].clone()
    tower.num_pos = tower.context_length = length


class TransformersText(TextEncoder):
    """A transformers encoder, its last hidden states averaged over the text's tokens."""

    def __init__(self, tower: TextTower) -> None:
        from transformers import AutoModel

        super().__init__()
        assert tower.weights is not None
        self.tokenizer = tokenizer_of(tower.weights)
        self.tower = AutoModel.from_pretrained(dtype=torch.float32, **source_of(tower.weights))
        if getattr(self.tower, "pooler", None) is not None:
            self.tower.pooler = None  # unused by the mean: it would be trained on nothing
        self.width = self.tower.config.hidden_size
        self.max_length = tower.max_length

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        """Texts padded to the longest of them."""
        return tokens_of(self.tokenizer, texts, self.max_length)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features [B, width]: the mean over a text's own tokens."""
        mask = tokens != self.tokenizer.pad_token_id
        states = self.tower(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def load_text_encoder(tower: TextTower) -> TextEncoder:
    """The encoder on the CPU, its parameters trainable when the tower is trained."""
    encoder = OpenClipText(tower) if tower.library == "open_clip" else TransformersText(tower)
    return encoder.requires_grad_(tower.trained)


class KnownTexts:
    """What a frozen encoder makes of texts that are known beforehand: computed once a node, by who comes first.

    The others do not even load the encoder.
    """

    def __init__(self, tower: TextTower, texts: Iterable[str]) -> None:
        distinct = sorted(set(texts))

        def write(path: Path) -> None:
            with path.open("wb") as file:  # a path's name would get another suffix
                np.save(file, encode_texts(load_text_encoder(tower), distinct, device()).numpy())

        key = digest_of(["texts", content_of(tower), distinct]).encode()
        self._features = np.load(shared(key, ".npy", write), mmap_mode="r")
        self._places = {text: place for place, text in enumerate(distinct)}
        self.width: int = self._features.shape[1]

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """In place of tokens, features float32 [len(texts), width]."""
        return torch.from_numpy(self._features[[self._places[text] for text in texts]])


def encoder_of(tower: TextTower, texts: Iterable[str] | None) -> TextEncoder | KnownTexts:
    """The encoder of these texts, None: of any. Where it is frozen and they are known, features of them are enough."""
    return load_text_encoder(tower) if tower.trained or texts is None else KnownTexts(tower, texts)


def text_width(tower: TextTower) -> int | None:
    """Width of a tower's features, without loading it; None where only loading tells."""
    if tower.library == "transformers":
        assert tower.weights is not None
        return config_of(tower.weights).hidden_size
    if ":" in (tower.model or ""):
        return None
    return open_clip_config(tower.model or "", tower.weights)["embed_dim"]


def check_text(tower: TextTower) -> None:
    """Raises UserError, or what the library does, when an encoder or its tokenizer would not load; no tensor is read."""
    text_width(tower)
    if tower.library == "transformers":
        from transformers import AutoModel

        assert tower.weights is not None
        check_model(tower.weights, AutoModel)
        if tokenizer_of(tower.weights).pad_token_id is None:
            raise UserError(f"the tokenizer of {tower.weights.location()} has no padding token; take another encoder")
    elif tower.pretrained:
        _check_tag(tower.model or "", tower.pretrained)


def _check_tag(model: str, tag: str) -> None:
    """Raises UserError when open_clip has no weights of this tag, or they are neither here nor on the hub."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag in tags:
        hub = open_clip.get_pretrained_cfg(model, tag).get("hf_hub")
        if hub:
            Weights(hub=hub.rstrip("/")).check()
    elif not Path(tag).exists():
        raise UserError(f"open_clip has no weights {tag!r} of {model}, only {', '.join(tags) or 'none'}; correct 'pretrained'")


@torch.no_grad()
def encode_texts(encoder: TextEncoder, texts: Sequence[str], device: str) -> torch.Tensor:
    """Features float32 [len(texts), width] of many texts, on the CPU. Similar lengths go together to save padding."""
    encoder.to(device).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = torch.empty(len(texts), encoder.width)
    for start in range(0, len(order), ENCODE_BATCH):
        chosen = order[start : start + ENCODE_BATCH]
        result[chosen] = encoder(encoder.tokenize([texts[i] for i in chosen]).to(device)).float().cpu()
    return result
