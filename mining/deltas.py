"""What can be said of a delta by its words alone."""

import re
from collections.abc import Sequence

RUN = 5  # words in a row that no labelled text says twice


def is_garbled(text: str) -> bool:
    """Whether a delta holds U+FFFD, half of a character, or repeats itself: `RUN` words in a row, or most of five or more."""
    words = re.findall(r"\w+", text.lower()) or text.split()
    if "\ufffd" in text or (len(words) >= 5 and len(set(words)) <= 0.4 * len(words)):
        return True
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    if len(set(runs)) < len(runs):
        return True
    return re.search(r"(.{1,8}?)\1{9}", text) is not None  # in one word, or without any


def are_garbled(texts: Sequence[str]) -> list[bool]:
    """As `is_garbled`, of each: a generator says the same of many pairs, and each text is looked at once."""
    known = {text: is_garbled(text) for text in set(texts)}
    return [known[text] for text in texts]
