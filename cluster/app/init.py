"""`vdg init`: a config for one's own images and triplets, checked against them, with test queries that nothing else sees."""

import json
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.app.config import PRESETS, load, read_config
from cluster.driver.progress import console
from cluster.errors import UserError
from mining import tables
from mining.config import GalleryConfig
from mining.labelled import read_captions, read_triplets
from mining.sources import counted, list_images

FEW_TRIPLETS = 50  # fewer cannot be split into folds that say anything
HELD_OUT = 0.2  # share of the labelled triplets that become test queries where none are given
LEAST_QUERIES = 5
NAMED_REJECTS = 10
_Row = dict[str, Any]


def write_config(folder: Path, images: str, triplets: str, queries: str | None, captions: str | None) -> Path:
    """Write `folder/vdg.yaml`, and beside it the names of the test queries' images.

    Without `queries` a fifth of the labelled triplets is held out by image: no image of a test query is in a triplet that is
    trained on. Raises UserError when data is missing or names do not match. Never overwrites a config.
    """
    path = folder / "vdg.yaml"
    if path.exists() or folder.is_file():
        raise UserError(f"{path if path.exists() else folder}: already exists; remove it or choose another folder")
    known = _images(images)
    names = {image: name for name, image in known.items()}
    files, rows = {"labelled": _absolute(triplets)}, {"labelled": _triplets("--triplets", triplets, known)}
    written: dict[str, Any] = {}
    if queries is not None:
        files["queries"], rows["queries"] = _absolute(queries), _triplets("--queries", queries, known)
    else:
        rows["labelled"], rows["queries"] = hold_out(rows["labelled"], triplets)
        for name, part in rows.items():
            files[name] = f"{name}.json"
            written[files[name]] = [
                {"reference": names[row["reference_id"]], "target": names[row["target_id"]], "captions": row["deltas"]}
                for row in part
            ]
    written["held-out.json"] = sorted(names[image] for image in _images_of(rows["queries"]))
    if captions is not None:
        _usable(captions, *read_captions(captions, known, None))
    _tell(rows["labelled"], rows["queries"], written["held-out.json"])
    text = _render(folder, _absolute(images), files, captions and _absolute(captions), len(rows["labelled"]))
    with TemporaryDirectory() as temporary:
        draft = Path(temporary) / path.name
        draft.write_text(text)
        load(str(draft), [])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))
    path.write_text(text)
    return path


def _images(images: str) -> dict[str, int]:
    """Id by name."""
    index, rejects, left_out = list_images(GalleryConfig(images=images), "--images")
    names = index["key"].to_pylist()
    console.print(f"{len(names):,} images, {len(rejects)} files rejected")
    for row in rejects[:NAMED_REJECTS]:
        console.print(f"{images}: rejected {row['key']}: {row['reason']}: {row['detail']}")
    if left_out:
        console.print(f"{images}: left out {counted(left_out)}")
    return {name: tables.stable_id("photos", name) for name in names}


def _triplets(option: str, file: str, known: Mapping[str, int]) -> list[_Row]:
    """Triplets that can be used. Raises UserError when there is none."""
    rows, _, rejects = read_triplets(file, known)
    return _usable(f"{option}: {file}", rows, rejects)


def _usable(file: str, rows: list[_Row], rejects: list[dict[str, str]]) -> list[_Row]:
    """The rows. Raises UserError when there is none, naming the first that cannot be used."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row["reason"] for row in rejects).items())
    first = f"; the first: {rejects[0]['key']}: {rejects[0]['detail']}" if rejects else ""
    if not rows:
        raise UserError(
            f"{file}: no row can be used ({reasons or 'the list is empty'}{first}); "
            "images are named by their path without suffix"
        )
    if rejects:
        console.print(f"{file}: {len(rejects)} rows will be rejected: {reasons}{first}")
    return rows


def hold_out(rows: list[_Row], file: str) -> tuple[list[_Row], list[_Row]]:
    """(triplets to train on, test queries), which share no image: whole components of the graph of images are drawn.

    Raises UserError where the triplets hang together so much that no such share exists.
    """
    wanted = HELD_OUT * len(rows)
    held: list[_Row] = []
    for component in sorted(_components(rows), key=lambda rows: min(row["triplet_id"] for row in rows)):
        if len(held) + len(component) <= wanted:
            held += component
    if len(held) < LEAST_QUERIES:
        raise UserError(
            f"--triplets: {file}: its {len(rows)} triplets share their images, so that no {LEAST_QUERIES} can be held out as "
            "test queries with images of their own; give test queries with --queries"
        )
    chosen = {row["triplet_id"] for row in held}
    return [row for row in rows if row["triplet_id"] not in chosen], held


def _components(rows: list[_Row]) -> list[list[_Row]]:
    """Triplets that hang together by shared images."""
    import networkx as nx

    graph: nx.Graph = nx.Graph((row["reference_id"], row["target_id"]) for row in rows)
    place = {image: i for i, images in enumerate(nx.connected_components(graph)) for image in images}
    found: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        found[place[row["reference_id"]]].append(row)
    return list(found.values())


def _images_of(rows: list[_Row]) -> set[int]:
    return {row[role] for row in rows for role in ("reference_id", "target_id")}


def _tell(labelled: list[_Row], queries: list[_Row], held_out: list[str]) -> None:
    console.print(f"{len(labelled):,} labelled triplets, {len(queries):,} test queries")
    console.print(f"{len(held_out):,} images of the test queries are neither labelled nor mined")
    if overlap := _images_of(labelled) & _images_of(queries):
        console.print(
            f"warning: {len(overlap):,} of them are in labelled triplets too, which will be rejected: keep test images apart"
        )
    if len(labelled) < FEW_TRIPLETS:
        console.print(f"warning: fewer than {FEW_TRIPLETS} labelled triplets teach a generator little; label more")


def _render(folder: Path, images: str, files: Mapping[str, str], captions: str | None, labelled: int) -> str:
    environment = Environment(loader=FileSystemLoader(PRESETS), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # YAML knows no surrogate pairs
    recipe = read_config("grocery")
    return environment.get_template("own.yaml.j2").render(
        name=re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "own",
        images=images,
        held_out="held-out.json",
        labelled=files["labelled"],
        queries=files["queries"],
        captions=captions,
        pairs=max(4 * labelled, 1000),
        tower=_yaml(recipe["embed"]["towers"]["photo"], 6),
        vdg=_yaml(recipe["vdg"], 2),
        text=_yaml({"text": recipe["train"]["text"]}, 2),
    )


def _yaml(content: Any, indent: int) -> str:
    """A part of a preset's recipe, at its place in the page."""
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=110)
    return textwrap.indent(text, " " * indent).rstrip()


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().resolve())
