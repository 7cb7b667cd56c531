"""What is said of a delta by its words."""

import pytest

from mining.deltas import are_garbled, is_garbled


@pytest.mark.parametrize(
    ("text", "garbled"),
    [
        ("a red \ufffd bag", True),
        ("red red red red red red", True),
        ("the bag the bag the bag the bag", True),
        ("aaaaaaaaaaaaaaaaaaaa", True),
        ("I prefer the one by tropicana and I prefer the one by", True),
        ("change the colour of the dog to the colour of the cat", False),
        ("!!!!!!!!!!!!!!!!", True),
        ("is red", False),
        ("red and red", False),
        ("the same bag on the same table, but the bag is red", False),
        ("show three bottles of soft drink", False),
        ("有三瓶红色的汽水", False),
    ],
)
def test_garbled_deltas(text: str, garbled: bool) -> None:
    assert is_garbled(text) == garbled
    assert are_garbled([text, "in red", text]) == [garbled, False, garbled]
