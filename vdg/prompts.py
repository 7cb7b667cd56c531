"""The prompts of both training stages, as token ids with places for image embeddings or as a chat, and their answers."""

import re
from collections.abc import Sequence
from typing import Any, Literal

Prompt = Literal["paper", "short"]
IMAGE = -1  # placeholder id of one projected image embedding
_SLOT = None  # stands between pieces of text where an image's embeddings go

# Pieces are tokenised one by one, as the paper's released code does (its Fig. 3).
_PAIR: dict[str, tuple[str | None, ...]] = {
    "paper": (
        "\n### You are a helpful language and vision assistant."
        "\n### You are able to understand reference and target images user provides."
        "\n### You should follow the instruction carefully and explain your answers clearly."
        "\n### Request:Analyze the given reference and target images and provide a description that transforms the reference "
        "to match the target.",
        "\n### Reference:",
        _SLOT,
        "\n### Target:",
        _SLOT,
        "\n### Response:",
    ),
    "short": ("Reference:", _SLOT, "\nTarget:", _SLOT, "\nChange:"),
}
_SINGLE: dict[str, tuple[str | None, ...]] = {
    "paper": ("\n### Request:{instruction}", "\n### Image:", _SLOT, "\n### Response:"),
    "short": ("{instruction}\nImage:", _SLOT, "\nCaption:"),
}
INSTRUCTIONS = (
    "Describe the image in a few words.",
    "Give a brief caption for this image.",
    "Write a short description of the picture.",
    "What does the image show? Answer briefly.",
    "Sum up what can be seen here in one phrase.",
    "Name the main content of the photo concisely.",
    "Provide a one-line caption.",
    "State shortly what this picture is of.",
)


def pair_prompt(tokenizer: Any, prompt: Prompt, image_tokens: int) -> list[int]:
    """Ids of the two-image prompt, up to where the delta begins; `image_tokens` placeholders an image."""
    return _ids(tokenizer, _PAIR[prompt], image_tokens)


def caption_prompt(tokenizer: Any, prompt: Prompt, image_tokens: int, instruction: str) -> list[int]:
    """Ids of the one-image prompt of alignment, up to where the caption begins."""
    pieces = [piece and piece.replace("{instruction}", instruction) for piece in _SINGLE[prompt]]
    return _ids(tokenizer, pieces, image_tokens)


def _ids(tokenizer: Any, pieces: Sequence[str | None], image_tokens: int) -> list[int]:
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for piece in pieces:
        ids += [IMAGE] * image_tokens if piece is _SLOT else encode(tokenizer, piece)
    return ids


def conversation(prompt: Prompt) -> list[dict[str, Any]]:
    """The two-image prompt as the one message of a chat, for a model's own template; the images stand where theirs do."""
    pieces = _PAIR[prompt]
    content = [{"type": "image"} if piece is _SLOT else {"type": "text", "text": piece} for piece in pieces]
    return [{"role": "user", "content": content}]


def answer_ids(tokenizer: Any, text: str, max_tokens: int, before: str = ":", gap: str = " ") -> list[int]:
    """Ids of a caption or delta and the end of text, at most `max_tokens`.

    The text is tokenised as it reads after the prompt's last character (`before`) and a `gap`, so that its first word is a
    word's usual token both where tokens carry their leading space (GPT, Llama 3) and where the tokenizer adds one itself
    (Llama 2).
    """
    ids = encode(tokenizer, f"{before}{gap}{text}")[len(encode(tokenizer, before)) :]
    return [*ids[: max_tokens - 1], tokenizer.eos_token_id]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone, without the tokenizer's own begin and end; what looks like a special token is text as well."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def clean(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated ids as the paper post-processes it.

    Cut at the end of text (without one the last token is dropped), text up to the last colon dropped, newlines removed.
    """
    ids = list(ids)
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids) - 1
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return " ".join(text.rpartition(":")[2].split())


_NO_CHANGE = re.compile(
    r"(there (is|are) )?no (visible |real |other )?(changes?|differences?)( (is|are) \w+)?"
    r"|nothing( else)?( (has|is|was))?( (changes?|changed|different))?"
    r"|(do not|don't|does not|doesn't) change( anything)?"
    r"|((it|they|everything|(both|the) (two )?(images?|photos?|pictures?)) )?(is |are |stays? |remains? )?"
    r"((exactly|completely|almost) )?(the same|identical|unchanged)( (images?|photos?|pictures?|thing|one|as before))?"
)


def says_no_change(text: str) -> bool:
    """Whether a delta says, as a whole, that nothing changes: "no change", "the same image", "is identical", nothing at all.

    "The same bag in red" and "no change in colour, but larger" do say something.
    """
    words = " ".join(re.findall(r"[\w']+", text.lower()))
    return not words or _NO_CHANGE.fullmatch(words) is not None
