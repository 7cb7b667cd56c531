"""LLaVA and Qwen2.5-VL as backbones: tiny ones of the real classes, with their own processors and chat templates."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoProcessor, LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from cluster.errors import UserError
from cluster.weights import Weights
from mining.images import decode
from tests import tiny
from vdg.backbones import build, make_inputs
from vdg.backbones.base import IGNORED
from vdg.backbones.image_text import ImageTextBackbone, ImageTextInputs
from vdg.config import GenerateConfig
from vdg.description import Description

GREEDY = GenerateConfig(greedy=True, max_new_tokens=9)
TEXTS = ["red", "a yellow bag with no label", "two apples"]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def weights(request, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return tiny.image_text_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def description(weights, vdg) -> Description:
    return Description(stage="instruct", vdg=vdg(backbone="image_text", language_model=weights))


@pytest.fixture
def inputs(description) -> ImageTextInputs:
    return make_inputs(description)


@pytest.fixture
def generator(description) -> ImageTextBackbone:
    torch.manual_seed(1)
    model = build(description)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # as after training: LoRA has an effect
    return model.eval()


@pytest.fixture
def pictures(photos) -> tuple[list[Image.Image], list[Image.Image]]:
    """Three references and three targets; they differ in size, so that the pairs' prompts may differ in length."""
    images = [decode(content) for _, content in photos[:6]]
    images = [image.crop((0, 0, 40 + 15 * i, 90 - 10 * i)) for i, image in enumerate(images)]
    return images[:3], images[3:]


def _row(pictures, row: int):
    return pictures[0][row : row + 1], pictures[1][row : row + 1]


def test_targets_are_the_delta_and_the_end_of_text_alone(inputs, weights, pictures):
    tokenizer = AutoProcessor.from_pretrained(weights.location()).tokenizer
    batch = inputs.pairs(*pictures, TEXTS)
    gap = " " if tokenizer.bos_token else ""  # after LLaVA's "ASSISTANT:"
    for row, text in enumerate(TEXTS):
        learnt = batch["targets"][row] != IGNORED
        assert tokenizer.decode(batch["targets"][row][learnt]) == gap + text + tokenizer.eos_token
        prompt = inputs.pairs(*_row(pictures, row))["input_ids"][0]
        first = int(learnt.nonzero()[0])
        assert torch.equal(batch["input_ids"][row, : first + 1], prompt)
        assert int(batch["attention_mask"][row].sum()) == len(prompt) + int(learnt.sum()) - 1


def test_the_prompt_is_the_models_own_chat(inputs, weights, pictures):
    processor = AutoProcessor.from_pretrained(weights.location())
    text = processor.tokenizer.decode(inputs.pairs(*_row(pictures, 0))["input_ids"][0])
    begin, end = ("USER: ", " ASSISTANT:") if "llava" in weights.location() else ("<|im_start|>user\n", "assistant\n")
    assert text.startswith(begin)
    assert text.endswith(end)
    assert text.index("Reference:") < text.index("Target:") < text.index("Change:")


def test_lora_is_on_the_language_model_alone(generator, inputs, pictures):
    """The image towers too have layers named q_proj and v_proj, or are reached by the gradient."""
    generator(inputs.pairs(*pictures, TEXTS))["loss"].backward()
    trained = {name for name, parameter in generator.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in generator.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, q and v, A and B
    assert all(".language_model.layers." in name and "lora_" in name for name in trained)


def test_loss_equals_the_rows_one_by_one(generator, inputs, pictures):
    losses = []
    for row, text in enumerate(TEXTS):  # without padding, over every position
        batch = inputs.pairs(*_row(pictures, row), [text])
        logits = generator.language_model(**generator.model_inputs(batch)).logits[0]
        losses.append(functional.cross_entropy(logits, batch["targets"][0], ignore_index=IGNORED, reduction="none"))
    expected = torch.cat(losses)
    batch = inputs.pairs(*pictures, TEXTS)
    torch.testing.assert_close(generator(batch)["loss"], expected.sum() / (batch["targets"] != IGNORED).sum())


def test_both_images_count_and_in_their_order(generator, inputs, pictures):
    references, targets = pictures
    loss = generator(inputs.pairs(references, targets, TEXTS))["loss"]
    for changed in ((targets, references), (targets, targets), (references, references)):
        assert abs(generator(inputs.pairs(*changed, TEXTS))["loss"] - loss) > 1e-4


def test_greedy_decoding_does_not_depend_on_the_batch(generator, inputs, pictures):
    texts, scores = generator.generate(inputs.pairs(*pictures), GREEDY, seed=0)
    for row in range(3):
        alone = generator.generate(inputs.pairs(*_row(pictures, row)), GREEDY, seed=5)
        assert alone[0] == [texts[row]]
        assert alone[1] == pytest.approx([scores[row]], abs=1e-4)


def test_score_equals_teacher_forcing(generator, inputs, pictures, monkeypatch):
    end, spoken = generator.tokenizer.eos_token_id, []
    decode = generator.decode
    monkeypatch.setattr(generator, "decode", lambda *a: spoken.append(decode(*a)) or spoken[0])
    _, scores = generator.generate(inputs.pairs(*pictures), GenerateConfig(temperature=3.0, max_new_tokens=9), seed=3)
    for row, ids in enumerate(spoken[0][0].tolist()):
        answer = ids[: ids.index(end) + 1] if end in ids else ids
        monkeypatch.setattr("vdg.backbones.image_text.answer_ids", lambda *_, answer=answer: answer)
        batch = inputs.pairs(*_row(pictures, row), [""])
        assert scores[row] == pytest.approx(-float(generator(batch)["loss"].detach()), abs=1e-4)


def test_merged_lora_generates_the_same(generator, inputs, pictures):
    batch = inputs.pairs(*pictures)
    before = generator.generate(batch, GREEDY, seed=0)
    generator.merge()
    assert isinstance(generator.language_model, LlavaForConditionalGeneration | Qwen2_5_VLForConditionalGeneration)
    after = generator.generate(batch, GREEDY, seed=0)
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1], abs=1e-4)


def test_weights_that_do_not_see_are_refused(language_model: Weights, vdg):
    config = vdg(backbone="image_text", language_model=language_model)
    with pytest.raises(UserError, match="is no image-text-to-text model"):
        build(Description(stage="instruct", vdg=config))


def test_a_model_without_a_chat_template_is_refused(weights, vdg, pictures, tmp_path: Path):
    processor = AutoProcessor.from_pretrained(weights.location())
    processor.chat_template = processor.tokenizer.chat_template = None
    processor.save_pretrained(tmp_path)
    config = vdg(backbone="image_text", language_model=Weights(folder=str(tmp_path)))
    with pytest.raises(UserError, match="chat template"):
        make_inputs(Description(stage="instruct", vdg=config)).pairs(*pictures)
