"""A labeller without a person: it knows what each photo shows, and how the texts of its set say what differs."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

AND = " and "  # between the clauses of a text
Attributes = Mapping[str, str]
Change = tuple[tuple[str, str | None], ...]  # attributes that differ, of those with two values alone the new one too


class Labeller:
    """Judges pairs by attributes; the templates of its own texts are those of a set's captions."""

    def __init__(self, attributes: Mapping[str, Attributes], triplets: Iterable[Mapping[str, Any]]) -> None:
        """`attributes` by an image's key, what it shows first; `triplets` with reference, target and captions."""
        self.attributes = attributes
        self._kind = next(iter(next(iter(attributes.values()))))
        values = {name: {row[name] for row in attributes.values()} for name in next(iter(attributes.values()))}
        self._flags = {name for name, found in values.items() if len(found) == 2}  # said by phrases, such as "not organic"
        named = {_plain(value) for name, found in values.items() if name not in self._flags for value in found}
        self._named = re.compile(rf"\b({'|'.join(map(re.escape, sorted(named, key=len, reverse=True)))})\b")
        self._phrases: dict[str, str] = {}  # what says a flag's value -> its claim
        self.templates: dict[Change, set[str]] = defaultdict(set)
        for triplet in triplets:
            self._learn(triplet["reference"], triplet["target"], _plain(triplet["captions"][0]))
        self._words = {word for texts in self.templates.values() for text in texts for word in self._others(text)}

    def _learn(self, reference: str, target: str, text: str) -> None:
        change, shown = self.change(reference, target), self.attributes[target]
        places = {_plain(shown[name]): f"{{{name}}}" for name, flag in change if flag is None}
        template = self._named.sub(lambda found: places.get(found[1], found[1]), text)
        for name, flag in change:
            for clause in template.split(AND):
                if flag is not None and "{" not in clause:
                    self._phrases[clause] = f"{name} is {flag}"
        self.templates[change].add(template)

    def change(self, reference: str, target: str) -> Change:
        """What differs between two images."""
        before, after = self.attributes[reference], self.attributes[target]
        return tuple((n, after[n] if n in self._flags else None) for n in after if before[n] != after[n])

    def judge(self, reference: str, target: str, deltas: Iterable[str], rng: np.random.Generator) -> tuple[str, str]:
        """(verdict, text): the first delta whose words fit, else a text as the set's are."""
        change = self.change(reference, target)
        if not change:
            return "no_change", ""
        if change not in self.templates:
            return "wrong", ""
        shown = {name: _plain(value) for name, value in self.attributes[target].items()}
        texts = [template.format(**shown) for template in sorted(self.templates[change])]
        allowed = {self.claims(text) for text in texts}
        if change[0][0] == self._kind:
            allowed.add(frozenset({shown[self._kind]}))  # who hears of another kind of thing expects all else of it to be new
        fitting = (d for d in deltas if self.claims(d) in allowed and self._words.issuperset(self._others(d)))
        right = next(fitting, None)
        return ("edited", texts[int(rng.integers(len(texts)))]) if right is None else ("right", right)

    def claims(self, text: str) -> frozenset[str]:
        """What a text says of the image that is wanted."""
        said = _plain(text)
        phrases = {self._phrases[clause] for clause in said.split(AND) if clause in self._phrases}
        return frozenset(self._named.findall(said)) | phrases

    def _others(self, text: str) -> list[str]:
        """The words of a text that claim nothing."""
        clauses = [clause for clause in _plain(text).split(AND) if clause not in self._phrases]
        return [word for clause in clauses for word in self._named.sub("", clause).split() if "{" not in word]


def _plain(text: str) -> str:
    return text.lower().replace("-", " ").strip()
