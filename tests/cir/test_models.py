"""Fusions, text encoders and the whole model."""

from typing import Any

import numpy as np
import pytest
import torch

from cir.models.combiner import Combiner
from cir.models.composed import ComposedRetrieval
from cir.models.residual import ResidualFusion
from cluster.errors import UserError
from mining.texts import load_text_encoder
from tests.cir import world

TEXTS = ["make it red", "a much longer delta that asks for a green cone and nothing else", "in blue"]


def rows(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_combiner_has_the_papers_sizes_and_unit_queries() -> None:
    model = Combiner(768)
    assert model.mix[0].weight.shape == (1536, 1536)
    assert model.image[0].weight.shape == (768, 768)
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
    queries = model(rows(5, 768), rows(5, 768, 1))
    torch.testing.assert_close(queries.norm(dim=-1), torch.ones(5))


@pytest.mark.parametrize(("bias", "chosen"), [(50.0, "text"), (-50.0, "image")])
def test_the_combiners_gate_chooses_between_text_and_image(bias: float, chosen: str) -> None:
    model = Combiner(8)
    for layer in (model.mix[-1], model.gate[-2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.constant_(model.gate[-2].bias, bias)
    inputs = {"image": rows(3, 8), "text": rows(3, 8, 1)}
    torch.testing.assert_close(model(**inputs), torch.nn.functional.normalize(inputs[chosen], dim=-1))


def test_residual_joins_unequal_widths_and_starts_from_the_reference() -> None:
    model = ResidualFusion(1280, 384).eval()
    assert model.output.weight.shape == (1280, 2048)
    assert model.dropout.p == 0.3
    queries = model(rows(5, 1280), rows(5, 384))
    torch.testing.assert_close(queries.norm(dim=-1), torch.ones(5))
    torch.nn.init.zeros_(model.output.weight)
    torch.nn.init.zeros_(model.output.bias)
    image = rows(5, 1280)
    torch.testing.assert_close(model(image, rows(5, 384)), torch.nn.functional.normalize(image, dim=-1))


def test_residual_equals_its_equation() -> None:
    model = ResidualFusion(6, 4, hidden=5).double().eval()
    x, t = (torch.nn.functional.normalize(rows(2, n).double(), dim=-1) for n in (6, 4))
    torch.nn.init.constant_(model.gate, 0.7)
    gelu = torch.nn.functional.gelu
    hidden = torch.cat(
        [gelu(4 * (x @ model.image.weight.T + model.image.bias)), gelu(4 * (t @ model.text.weight.T + model.text.bias))], 1
    )
    expected = torch.sigmoid(torch.tensor(0.7)) * x + hidden @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(x * 3, t * 2), torch.nn.functional.normalize(expected, dim=-1).float())


def test_without_image_units_the_change_is_the_texts_alone() -> None:
    model = ResidualFusion(6, 4, hidden=5, image_hidden=0).eval()
    torch.nn.init.constant_(model.gate, -50.0)
    text = rows(3, 4)
    torch.testing.assert_close(model(rows(3, 6), text), model(rows(3, 6, 1), text))


def model(text: dict[str, Any], **changes: Any) -> ComposedRetrieval:
    config = world.variant(text, **changes)
    torch.manual_seed(0)
    return ComposedRetrieval(config, world.DIM, load_text_encoder(config.text)).eval()


def test_tokens_and_cached_features_give_one_query(tiny_bert: dict[str, Any]) -> None:
    module = model(tiny_bert)
    assert module.text is not None
    tokens = module.text.tokenize(TEXTS)
    torch.testing.assert_close(module.compose(rows(3, 16), tokens), module.compose(rows(3, 16), module.text(tokens)))


def test_a_text_that_comes_twice_is_encoded_once(tiny_bert: dict[str, Any]) -> None:
    module, encoded = model(tiny_bert), []
    assert module.text is not None
    tokens = module.text.tokenize(TEXTS)
    alone = module.compose(rows(3, 16), tokens)
    module.text.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    again = module.compose(torch.cat([rows(3, 16)] * 2), torch.cat([tokens, tokens]))
    torch.testing.assert_close(again, torch.cat([alone, alone]))
    assert encoded == [3]


@pytest.mark.parametrize("zero", ["image", "text"])
def test_a_zeroed_input_does_not_matter(tiny_bert: dict[str, Any], zero: str) -> None:
    module = model(tiny_bert, zero=zero)
    image, text = rows(3, 16), rows(3, 32)
    changed = (image + 1, text) if zero == "image" else (image, text + 1)
    other = (image, text + 1) if zero == "image" else (image + 1, text)
    torch.testing.assert_close(module.compose(image, text), module.compose(*changed))
    assert not torch.allclose(module.compose(image, text), module.compose(*other))


def semi_batch() -> dict[str, Any]:
    """Four labelled and four pseudo rows."""
    images = {"reference": rows(8, 16), "target": rows(8, 16, 1)}
    ids = {"reference_id": torch.arange(8) + 8, "target_id": torch.arange(8)}
    return {**images, **ids, "text": rows(8, 32), "supervised": 4}


def test_forward_gives_losses_and_temperature(tiny_bert: dict[str, Any]) -> None:
    batch = semi_batch()
    found = model(tiny_bert)(batch)
    assert set(found) == {"loss", "loss_supervised", "loss_joint", "temperature"}
    assert float(found["temperature"]) == pytest.approx(np.exp(-2.9), rel=1e-5)
    torch.testing.assert_close(found["loss"], found["loss_supervised"] + found["loss_joint"])
    assert float(model(tiny_bert, temperature="fixed")(batch)["temperature"]) == pytest.approx(0.01)


def test_the_learned_scale_stops_at_100(tiny_bert: dict[str, Any]) -> None:
    module = model(tiny_bert)
    assert module.log_scale is not None
    torch.nn.init.constant_(module.log_scale, 9.0)
    assert float(module.scale(module.log_scale)) == 100.0


def test_a_bf16_module_takes_fp32_inputs(tiny_bert: dict[str, Any]) -> None:
    found = model(tiny_bert).bfloat16()(semi_batch())
    assert found["loss"].dtype == torch.float32
    assert torch.isfinite(found["loss"])


def test_the_reference_as_a_negative_costs_a_query_that_stays_near_it(tiny_bert: dict[str, Any]) -> None:
    plain, harder = model(tiny_bert), model(tiny_bert, loss={"reference_negative": True})
    batch = semi_batch()
    assert float(harder(batch)["loss"]) > float(plain(batch)["loss"])
    batch["reference_id"] = batch["target_id"]
    torch.testing.assert_close(harder(batch)["loss"], plain(batch)["loss"])


def test_unlabelled_images_are_negatives_and_no_weights(tiny_bert: dict[str, Any]) -> None:
    plain, harder = model(tiny_bert), model(tiny_bert, loss={"unlabelled": 4})
    batch = semi_batch()
    near = plain.compose(batch["reference"], batch["text"]).detach().numpy()[:4]
    harder.hold_unlabelled(np.arange(900, 904), near)
    assert float(harder(batch)["loss"]) > float(plain(batch)["loss"])
    assert harder.state_dict().keys() == plain.state_dict().keys()


def test_the_combiner_refuses_unequal_widths(tiny_bert: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="one width, found 16 and 32"):
        model(tiny_bert, fusion="combiner")
