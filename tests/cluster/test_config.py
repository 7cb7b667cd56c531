from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, model_serializer

from cluster.config import PARTIAL, Section, in_folder, override, path_field, read_yaml, validate
from cluster.errors import UserError


class Inner(Section):
    batch_size: int = Field(gt=0)


class Rated(Section):
    rate: float


class Outer(Section):
    name: str
    train: Inner


def test_override_sets_nested_fields_and_leaves_the_rest() -> None:
    content = {"name": "a", "train": {"batch_size": 4}}
    assert override(content, ["train.batch_size=8", "x.y=[1, 2]"]) == {
        "name": "a",
        "train": {"batch_size": 8},
        "x": {"y": [1, 2]},
    }
    assert content["train"] == {"batch_size": 4}


@pytest.mark.parametrize("assignment", ["train.batch_size", "=3", "name.x=1"])
def test_wrong_assignments_are_named(assignment: str) -> None:
    with pytest.raises(UserError, match="--set"):
        override({"name": "a"}, [assignment])


def test_unknown_key_and_negative_batch_size_are_named() -> None:
    with pytest.raises(UserError) as error:
        validate(Outer, {"name": "a", "train": {"batch_size": -2, "bathc": 1}}, "run.yaml")
    message = str(error.value)
    assert "run.yaml: 2 wrong field(s)" in message
    assert "train.batch_size" in message
    assert "'-2'" in message
    assert "train.bathc" in message


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(UserError, match="rate: Input should be a finite number"):
        validate(Rated, {"rate": value}, "run.yaml")


class Interrupted(Section):
    @model_serializer()
    def _stop(self) -> dict[str, Any]:
        raise KeyboardInterrupt


class Holder(Section):
    section: Interrupted = Interrupted()


def test_an_interrupt_while_a_config_is_written_is_one() -> None:
    with pytest.raises(KeyboardInterrupt):
        Holder().model_dump(mode="json")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: Käse".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: is not valid YAML"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="found list"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")


class Files(Section):
    one: str = path_field("a file")
    several: str | list[str] = path_field("files", "x")
    name: str = "n"


class Whole(Section):
    files: dict[str, Files]
    first: Files | None = None
    variants: dict[str, dict[str, Any]] = Field({}, json_schema_extra=PARTIAL)


def test_relative_paths_start_at_the_file_that_names_them(tmp_path: Path) -> None:
    content = {
        "files": {"a": {"one": "x.json", "several": ["y", "/z", "s3://b/w"], "name": "n.json"}},
        "first": {"one": "~/x"},
        "variants": {"v": {"first": {"one": "v.json"}}, "off": None},
        "unknown": 3,
    }
    assert in_folder(Whole, content, tmp_path) == {
        "files": {"a": {"one": f"{tmp_path}/x.json", "several": [f"{tmp_path}/y", "/z", "s3://b/w"], "name": "n.json"}},
        "first": {"one": "~/x"},
        "variants": {"v": {"first": {"one": f"{tmp_path}/v.json"}}, "off": None},
        "unknown": 3,
    }
    for odd in (None, 3, [], {"files": None, "first": [1]}):
        assert in_folder(Whole, odd, tmp_path) == odd


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: {b: 1, b: 2}",
        "a: 2024-13-45",
        "a: 2024-01-01",
        "a: " + "9" * 5000,
        "a: 99999999999999999999",
        "a: " + "[" * 5000,
        'a: "\\0"',
        'a: "\\ud800"',
        "a: \0",
        "a: &x [*x]",
        "a: !!binary xx",
        "a: !!python/object:os.system x",
        "a: !!int x",
        "a: !!timestamp x",
        "a: !!float ''",
        "a: !!bool x",
        "? [1]\n: 2",
        "? {a: 1}\n: 2",
        "1: 2",
        "a: !!set {x}",
        "<<: 1",
    ],
)
def test_what_no_config_can_hold_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml: is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
    if text.startswith("a: ") and "\n" not in text:
        with pytest.raises(UserError, match="--set"):
            override({}, ["x.y=" + text.removeprefix("a: ")])


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: &a {b: [*a]}"])
def test_aliases_of_aliases_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml: is not valid YAML: .*more than 100,000|holds itself"):
        read_yaml(tmp_path / "a.yaml")


def test_a_merged_key_may_be_given_anew(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {lr: 1}\ndeep: {er: {b: &b {<<: *a, lr: 2}}}\nc: {<<: *b, steps: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["c"] == {"lr": 2, "steps": 3}


@pytest.mark.parametrize("assignment", ["a..b=1", ".a=1", "a.=1", "\udcff=1", "a=\udcff", "a=\0"])
def test_names_and_values_of_assignments(assignment: str) -> None:
    with pytest.raises(UserError, match="--set"):
        override({}, [assignment])


def test_a_name_with_a_nul_is_no_file() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(Path("a\0.yaml"))
