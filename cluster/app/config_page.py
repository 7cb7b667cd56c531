"""The page docs/config.md: every field of a run's config, from the JSON Schema of its models.

`python -m cluster.app.config_page > docs/config.md` writes it; a test keeps it current.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from cluster.app.config import RunConfig

Schema = dict[str, Any]
HEAD = """# Config

<!-- written by `python -m cluster.app.config_page`; change the descriptions in the config models instead -->

A config is a YAML file of these sections. `extends:` names presets or files that it is put over, section by section;
`--set section.field=value` is put over both. Unknown fields are errors. `vdg show CONFIG` prints what comes out,
`vdg schema > vdg.schema.json` the JSON Schema of this page, with which an editor completes and checks a file that begins with

```yaml
# yaml-language-server: $schema=vdg.schema.json
```

`NAME` stands for a name of one's own. A field without a default is required.
"""
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def page() -> str:
    """Markdown: a table for each section, in the order in which a run's config holds them."""
    schema = RunConfig.model_json_schema()
    found = _sections(schema)
    places = {id(section): place for place, section in reversed(found)}
    links = {name: places[id(section)] for name, section in schema["$defs"].items() if id(section) in places}
    said = {name: _first(section["description"]) for name, section in schema["$defs"].items()}
    return HEAD + "".join(_table(place, section, links, said) for place, section in found)


def _sections(schema: Schema) -> list[tuple[str, Schema]]:
    """(where it stands, schema) of each section, once."""
    found: list[tuple[str, Schema]] = []

    def walk(place: str, section: Schema) -> None:
        if any(section is known for _, known in found):
            return
        found.append((place, section))
        for name, field in section["properties"].items():
            for suffix, reference in _references(field):
                walk(f"{place}.{name}{suffix}".lstrip("."), schema["$defs"][reference])

    walk("", schema)
    return found


def _references(field: Schema) -> Iterator[tuple[str, str]]:
    """(what a path to it ends in, name of the section) of the sections that a field holds."""
    for kind in field.get("anyOf", [field]):
        if "$ref" in kind:
            yield "", kind["$ref"].rpartition("/")[2]
        elif "$ref" in (values := _values(kind)):
            yield ".NAME", values["$ref"].rpartition("/")[2]


def _values(kind: Schema) -> Schema:
    """The kind of a mapping's values."""
    values = kind.get("additionalProperties", {})
    return values if isinstance(values, dict) else {}


def _first(text: str) -> str:
    """The first paragraph of a docstring."""
    return text.split("\n\n")[0].replace("\n", " ")


def _table(place: str, section: Schema, links: dict[str, str], said: dict[str, str]) -> str:
    """`links`: where each section stands; `said`: what each is, for fields that say no more."""
    heading = f"## `{place}`" if place else "## The run"
    lines = ["", heading, "", _first(section["description"]), ""]
    lines += ["| field | kind | default | what it is |", "|---|---|---|---|"]
    for name, field in section["properties"].items():
        text = field.get("description") or said[next(_references(field))[1]]
        text = re.sub(r"([|*<>])", r"\\\1", re.sub(r"\bNone\b", "null", text))  # a cell, in YAML's words
        value = field.get("default")
        own = isinstance(value, dict) and value  # a section's defaults are in its own table
        default = "" if name in section.get("required", []) else "its own" if own else f"`{json.dumps(value)}`"
        lines.append(f"| `{name}` | {_kind(field, links)} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def _kind(field: Schema, links: dict[str, str]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(kind, links) for kind in field["anyOf"])
    if "$ref" in field:
        place = links[field["$ref"].rpartition("/")[2]]
        return f"[{place}](#{place.replace('.', '').lower()})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        return f"{len(field['prefixItems'])} x {_kind(field['prefixItems'][0], links)}"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], links)}"
    if field.get("type") == "object":
        values = _values(field)
        return f"name -> {_kind(values, links)}" if values else "fields"
    limits = [f"{word} {field[bound]}" for bound, word in BOUNDS.items() if bound in field]
    return ", ".join([field.get("type", "any value"), *limits])


if __name__ == "__main__":
    print(page(), end="")
