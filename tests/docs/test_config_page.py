"""docs/config.md says what the config models say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from cluster.app.config import RunConfig
from cluster.app.config_page import page

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def sections(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from sections(field.annotation)
    for argument in get_args(kind):
        yield from sections(argument)


def test_every_field_says_what_it_is() -> None:
    for section in set(sections(RunConfig)):
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            is_section = any(True for _ in sections(field.annotation))
            assert field.description or is_section, f"{section.__name__}.{name} has no description"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"
