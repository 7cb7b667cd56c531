"""`vdg init`: an annotated config for one's own images and triplets, checked against them."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.app.config import PRESETS, load
from cluster.driver.progress import console
from cluster.errors import UserError
from mining.config import GalleryConfig
from mining.labelled import read_captions, read_triplets
from mining.sources import counted, list_images

LEAST_TRIPLETS = 50  # fewer cannot be split into folds that say anything
NAMED_REJECTS = 10


def write_config(folder: Path, images: str, triplets: str, queries: str | None, captions: str | None) -> Path:
    """Write `folder/vdg.yaml`, with absolute paths. Raises UserError when data is missing or names do not match.

    Never overwrites a config.
    """
    path = folder / "vdg.yaml"
    if path.exists() or folder.is_file():
        raise UserError(f"{path if path.exists() else folder}: already exists; remove it or choose another folder")
    counts = _check(images, triplets, queries, captions)
    console.print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    environment = Environment(loader=FileSystemLoader(PRESETS), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # YAML knows no surrogate pairs
    text = environment.get_template("own.yaml.j2").render(
        name=re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "own",
        images=_absolute(images),
        triplets=_absolute(triplets),
        queries=_absolute(queries or triplets),
        captions=_absolute(captions) if captions else None,
        pairs=max(4 * counts["labelled triplets"], 1000),
    )
    with TemporaryDirectory() as temporary:
        draft = Path(temporary) / path.name
        draft.write_text(text)
        load(str(draft), [])
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _check(images: str, triplets: str, queries: str | None, captions: str | None) -> dict[str, int]:
    """Rows of each file that can be used. Raises UserError when a file has none, or too few."""
    index, rejects, left_out = list_images(GalleryConfig(images=images), "--images")
    known = {key: i for i, key in enumerate(index["key"].to_pylist())}
    counts = {"images": len(known), "files rejected": len(rejects)}
    for row in rejects[:NAMED_REJECTS]:
        console.print(f"{images}: rejected {row['key']}: {row['reason']}: {row['detail']}", markup=False)
    if left_out:
        console.print(f"{images}: left out {counted(left_out)}", markup=False)
    for what, file in (("labelled triplets", triplets), ("queries", queries)):
        if file is not None:
            counts[what] = _check_triplets(file, known)
    if captions is not None:
        counts["captions"] = _usable(captions, *read_captions(captions, known, None))
    if counts["labelled triplets"] < LEAST_TRIPLETS:
        raise UserError(
            f"--triplets: {triplets} has {counts['labelled triplets']} rows, fewer than {LEAST_TRIPLETS}; label more"
        )
    return counts


def _check_triplets(file: str, known: Mapping[str, int]) -> int:
    rows, _, rejects = read_triplets(file, known)
    return _usable(file, rows, rejects)


def _usable(file: str, rows: list[Any], rejects: list[dict[str, str]]) -> int:
    """The number of rows. Raises UserError when there is none."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(row["reason"] for row in rejects).items())
    if not rows:
        example = f"{reasons}; the first: {rejects[0]['detail']}" if rejects else "the list is empty"
        raise UserError(f"{file}: no row can be used ({example}); images are named by their path without suffix")
    if rejects:
        console.print(f"{file}: {len(rejects)} rows will be rejected: {reasons}")
    return len(rows)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().resolve())
