import pytest

from vdg.agreement import medoid, word_f1


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("a red bag", "A Red BAG", 1.0),
        ("red bag", "bag", 2 / 3),
        ("red red bag", "red bag bag", 2 / 3),
        ("red", "green", 0.0),
        ("", "", 0.0),
        ("", "red", 0.0),
    ],
)
def test_word_f1(left, right, expected):
    assert word_f1(left, right) == word_f1(right, left) == pytest.approx(expected)


def test_the_medoid_agrees_best_with_the_others():
    assert medoid(["two green apples", "red bag", "a red bag"]) == (1, pytest.approx((0 + 0.8) / 2))
    assert medoid(["green", "red", "red"]) == (1, 0.5)
    assert medoid(["", "", "red"]) == (0, 0.0)
