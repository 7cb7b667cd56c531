"""Text encoders."""

from typing import Any

import open_clip
import pytest
import torch

from mining.config import TextTower
from mining.texts import _split_special_tokens, encode_texts, load_text_encoder, text_width

TEXTS = ["make it red", "a much longer delta that asks for a green cone and nothing else", "in blue"]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tower", ["tiny_bert", "tiny_clip"])
def test_text_towers(tower: str, trained: bool, request: pytest.FixtureRequest) -> None:
    config = TextTower.model_validate({**request.getfixturevalue(tower), "trained": trained, "max_length": 12})
    encoder = load_text_encoder(config).eval()
    tokens = encoder.tokenize(TEXTS)
    assert tokens.dtype == torch.int64
    assert tokens.shape[1] <= 12
    features = encoder(tokens)
    assert features.shape == (3, encoder.width)
    assert encoder.width == text_width(config)
    assert all(p.requires_grad is trained for p in encoder.parameters())
    cached = encode_texts(encoder, TEXTS, "cpu")
    torch.testing.assert_close(cached, features.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cached[:1], encoder(encoder.tokenize(TEXTS[:1])).detach(), rtol=1e-4, atol=1e-5)


def test_open_clip_text_equals_the_librarys_own(tiny_clip: dict[str, Any]) -> None:
    config = TextTower.model_validate(tiny_clip)
    assert config.weights is not None
    whole = open_clip.create_model("tiny-clip", pretrained=config.weights.location()).eval()
    expected = whole.encode_text(open_clip.get_tokenizer("tiny-clip")(TEXTS))
    encoder = load_text_encoder(config).eval()
    assert encoder.tokenize(TEXTS).shape == (3, 32)
    torch.testing.assert_close(encoder(encoder.tokenize(TEXTS)), expected, rtol=1e-4, atol=1e-5)


def test_a_users_text_never_yields_special_tokens() -> None:
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    before = tokenizer(["a red bag"])
    _split_special_tokens(tokenizer)
    assert torch.equal(tokenizer(["a red bag"]), before)
    for text in ("a <end_of_text> bag", "<START_OF_TEXT>", "&lt;end_of_text&gt;"):
        inner = [i for i in tokenizer.encode(text) if i in tokenizer.all_special_ids]
        assert inner == []
