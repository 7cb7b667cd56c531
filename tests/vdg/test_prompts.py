"""Prompts, answers and the paper's post-processing."""

import pytest

from cluster.weights import Weights
from tests import tiny
from vdg.language import load_tokenizer
from vdg.prompts import (
    IMAGE,
    INSTRUCTIONS,
    answer_ids,
    caption_prompt,
    clean,
    conversation,
    encode,
    pair_prompt,
    says_no_change,
)

PAPER_TEXT = (
    "<s>\n### You are a helpful language and vision assistant."
    "\n### You are able to understand reference and target images user provides."
    "\n### You should follow the instruction carefully and explain your answers clearly."
    "\n### Request:Analyze the given reference and target images and provide a description that transforms the reference to "
    "match the target.\n### Reference:@@\n### Target:@@\n### Response:"
)


@pytest.fixture(scope="module")
def tokenizer(language_model: Weights):
    return load_tokenizer(language_model)


def _text(tokenizer, ids: list[int]) -> str:
    marker = encode(tokenizer, "@")
    return tokenizer.decode([i for token in ids for i in (marker if token == IMAGE else [token])])


def test_paper_prompt_is_the_papers(tokenizer):
    assert _text(tokenizer, pair_prompt(tokenizer, "paper", 2)) == PAPER_TEXT


def test_pieces_are_tokenised_one_by_one(tokenizer):
    ids = pair_prompt(tokenizer, "short", 1)
    pieces = [encode(tokenizer, piece) for piece in ("Reference:", "\nTarget:", "\nChange:")]
    assert ids == [0, *pieces[0], IMAGE, *pieces[1], IMAGE, *pieces[2]]


@pytest.mark.parametrize("prompt", ["paper", "short"])
def test_caption_prompt_has_one_image_and_the_instruction(tokenizer, prompt):
    ids = caption_prompt(tokenizer, prompt, 5, INSTRUCTIONS[0])
    assert ids.count(IMAGE) == 5
    assert INSTRUCTIONS[0] in _text(tokenizer, ids)


def test_answer_starts_with_its_space_and_ends_with_eos(tokenizer):
    ids = answer_ids(tokenizer, "two apples", 32)
    assert tokenizer.decode(ids) == " two apples</s>"
    assert encode(tokenizer, "\nChange:") + ids[:-1] == encode(tokenizer, "\nChange: two apples")


def test_long_answer_is_cut(tokenizer):
    ids = answer_ids(tokenizer, "abcdefgh " * 20, 6)
    assert len(ids) == 6
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("text", "ended", "cleaned"),
    [
        (" red bag", True, "red bag"),
        (" red bag", False, "red ba"),  # one letter a token: the last one is dropped
        (" Change: make it: red", True, "make it: red".partition(": ")[2]),
        (" red\nbag\n", True, "red bag"),
        ("", True, ""),
        (" red:", True, ""),
    ],
)
def test_post_processing(tokenizer, text, ended, cleaned):
    ids = [i for letter in text for i in encode(tokenizer, letter)]
    assert clean(tokenizer, [*ids, tokenizer.eos_token_id, 7, 7] if ended else ids) == cleaned


@pytest.mark.parametrize("prompt", ["paper", "short"])
def test_the_chat_says_what_the_prompt_says(tokenizer, prompt):
    (message,) = conversation(prompt)
    said = ["@" if part["type"] == "image" else part["text"] for part in message["content"]]
    written = _text(tokenizer, pair_prompt(tokenizer, prompt, 1)).removeprefix("<s>")
    assert "".join(said) == written


@pytest.mark.parametrize(
    "text",
    [
        "No change.",
        "nothing changes",
        "the same",
        "is identical",
        "exactly the same",
        "The images are identical",
        "no visible difference",
        "there is no difference",
        "nothing has changed",
        "",
        " ... ",
    ],
)
def test_no_change_is_recognised(text):
    assert says_no_change(text)


@pytest.mark.parametrize(
    "text",
    [
        "the same bag in red",
        "no change in colour but larger",
        "nothing on the shelf",
        "change it to red",
        "no label",
        "red",
        "identical but smaller",
    ],
)
def test_a_delta_that_says_something_is_kept(text):
    assert not says_no_change(text)


@pytest.mark.parametrize("text", ["</s>", "a <s> bag", "<image>", "</s></s>red"])
def test_a_users_text_never_yields_special_tokens(text):
    words = tiny.tokenizer(("<image>",))
    ids = encode(words, text)
    assert not set(ids) & set(words.all_special_ids)
    assert words.decode(ids) == text
    answer = answer_ids(words, text, 50)
    assert set(answer[:-1]).isdisjoint(words.all_special_ids)
