"""How far several deltas of one pair say the same: the one that agrees best with the others is kept (their medoid)."""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def word_f1(left: str, right: str) -> float:
    """F1 of two texts as bags of lower-case words, 0 to 1; a text without words agrees with nothing."""
    words, others = (Counter(text.lower().split()) for text in (left, right))
    common = (words & others).total()
    return 2 * common / (words.total() + others.total()) if common else 0.0


def medoid(texts: Sequence[str]) -> tuple[int, float]:
    """The place of the text of highest mean F1 with the others, the first of equals, and that mean; at least two texts."""
    agreements = np.array([[word_f1(left, right) for right in texts] for left in texts])
    np.fill_diagonal(agreements, 0.0)
    means = agreements.sum(1) / (len(texts) - 1)
    best = int(means.argmax())
    return best, float(means[best])
