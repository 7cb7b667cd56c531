"""Whatever a file or an assignment holds, there is an answer or a UserError: never another exception."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cir.vectors import Given
from cluster.app.config import RunConfig, load, read_config
from cluster.config import override, read_yaml, validate
from cluster.errors import UserError
from mining.config import GalleryConfig
from mining.labelled import read_captions, read_triplets
from mining.sources import list_images

EXAMPLES = int(os.environ.get("EXAMPLES", "60"))
quick = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
KNOWN = {"a": 1, "b": 2}
SMOKE = read_config("demo")
PARTS = [": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!!binary ", "? ", "|", ">", "\n", "  ", '"\\ud800"', "\0"]
PARTS += ["2024-13-45", "9" * 5000, ".inf", ".nan", "0x", "1e999", "<<", "~nobody/x", "http://", "ingest", "embed", "'", "#"]
yaml_texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=12).map("".join)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["a", "b", "a.jpg"])
odd = st.sampled_from(["\ud800", "\0", "", 10**400, "~nobody/x", "../../x"])
values = st.recursive(
    plain | odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
FIELDS = ["reference", "target", "captions", "caption", "text", "image", "key", "pairid", "group", "img_set", "conversations"]
SET = ["name", "root", "seed", "embed.towers", "vdg.tower", "mine.triplets", "ingest", "", "a..b"]
COLUMNS = ["kind", "key", "vector", "image", "caption", "text", "reference", "target"]
fields = st.sampled_from(FIELDS)
rows = st.lists(st.dictionaries(fields, values, max_size=5) | values, max_size=4)


def tried(call: Callable[..., Any], *arguments: Any) -> None:
    with suppress(UserError):
        call(*arguments)


def _written(content: bytes, suffix: str, read: Callable[[str], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"file{suffix}"
        file.write_bytes(content)
        tried(read, str(file))


def _labels(file: str) -> None:
    tried(read_triplets, file, KNOWN)
    tried(read_captions, file, KNOWN, ":")
    tried(lambda: list_images(GalleryConfig(images=str(Path(file).parent), split=file), "images"))


@quick
@given(yaml_texts)
def test_configs(text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    _written(content, ".yaml", lambda file: validate(RunConfig, read_yaml(Path(file)), file))
    _written(content, ".yaml", lambda file: load(file, []))


@quick
@given(
    st.sampled_from(SET),
    yaml_texts,
    values,
)
def test_assignments(name: str, text: str, value: Any) -> None:
    tried(lambda: validate(RunConfig, override(SMOKE, [f"{name}={text}"]), "smoke"))
    tried(lambda: validate(RunConfig, {**SMOKE, (name.partition(".")[0] or "x"): value}, "smoke"))


@quick
@given(rows)
def test_labels_of_json(content: list[Any]) -> None:
    text = json.dumps(content).encode()
    for suffix in (".json", ".jsonl"):
        _written(text, suffix, _labels)
    _written(b"\n".join(json.dumps(row).encode() for row in content), ".jsonl", _labels)


@quick
@given(st.binary(max_size=60) | yaml_texts.map(lambda t: t.encode("utf-8", "surrogatepass")), st.integers(0, 4))
def test_bytes_of_any_form(content: bytes, header: int) -> None:
    begin = [b"", b"reference,target,caption\n", b"image;caption\n", b'[{"reference": ', b"PAR1"][header]
    for suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar"):
        _written(begin + content, suffix, _labels)
    _written(begin + content, ".parquet", lambda file: list(Given(file).blocks()))


columns = st.sampled_from(
    [
        pa.array(["a", "b"]),
        pa.array([b"\xff", b"a"]).view(pa.string()),
        pa.array([None, "a"]),
        pa.array([1, 2]),
        pa.array([1.5, None]),
        pa.array([[1.0], [2.0]]),
        pa.array([[1.0, 2.0], None]),
        pa.array([["x"], []]),
        pa.array([{"path": "a", "bytes": b""}, None]),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([b"a", b"b"]),
        pa.nulls(2),
        pa.array(["query", "gallery"]),
        pa.array([[float("nan")], [0.0]]),
    ]
)


@quick
@given(st.dictionaries(st.sampled_from(COLUMNS), columns, min_size=1))
def test_tables_of_any_columns(table: dict[str, pa.Array]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/a.parquet"
        pq.write_table(pa.table(table), file)
        _labels(file)
        tried(lambda: list_images(GalleryConfig(images=file), "images"))
        vectors = Given(file)
        tried(lambda: list(vectors.blocks()))
        tried(lambda: vectors.check(_Nothing()))  # type: ignore[arg-type]


class _Nothing:
    images, names, queries = np.zeros(0, int), (), ()


@pytest.mark.parametrize("path", ["~nobody-at-all/x", "http://", "x\0y", "foo://bar", "file://host/x", "\udcff"])
def test_paths_that_lead_nowhere(path: str) -> None:
    for suffix in ("", ".json", ".csv", ".parquet", ".tar"):
        for read in (
            lambda file: read_triplets(file, KNOWN),
            lambda file: read_captions(file, KNOWN, None),
            lambda file: list_images(GalleryConfig(images=file), "images"),
            lambda file: list(Given(file).blocks()),
            lambda file: load(file, []),
        ):
            with pytest.raises(UserError):
                read(path + suffix)
