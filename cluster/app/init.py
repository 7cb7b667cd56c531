"""`vdg init`: an annotated config for one's own images and triplets, checked against them."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.app.config import PRESETS, load
from cluster.errors import UserError
from cluster.progress import console
from mining.config import GalleryConfig
from mining.gallery import read_rows
from mining.sources import list_images

LEAST_TRIPLETS = 50  # fewer cannot be split into folds that say anything


def write_config(folder: Path, images: str, triplets: str, queries: str | None, captions: str | None) -> Path:
    """Write `folder/vdg.yaml`, with absolute paths. Raises UserError when data is missing or names do not match.

    Never overwrites a config.
    """
    path = folder / "vdg.yaml"
    if path.exists():
        raise UserError(f"{path}: already exists; remove it or choose another folder")
    counts = _check(images, triplets, queries)
    console.print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    environment = Environment(loader=FileSystemLoader(PRESETS), undefined=StrictUndefined, keep_trailing_newline=True)
    text = environment.get_template("own.yaml.j2").render(
        name=folder.resolve().name,
        images=_absolute(images),
        triplets=_absolute(triplets),
        queries=_absolute(queries or triplets),
        captions=_absolute(captions) if captions else None,
        pairs=max(4 * counts["labelled triplets"], 1000),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    load(str(path), [])
    return path


def _check(images: str, triplets: str, queries: str | None) -> dict[str, int]:
    index, rejects = list_images(GalleryConfig(images=images), "--images")
    known = set(index["key"].to_pylist())
    counts = {"images": len(known), "files rejected": len(rejects)}
    for what, file in (("labelled triplets", triplets), ("queries", queries)):
        if file is not None:
            counts[what] = _check_triplets(file, known)
    if counts["labelled triplets"] < LEAST_TRIPLETS:
        raise UserError(
            f"--triplets: {triplets} has {counts['labelled triplets']} rows, fewer than {LEAST_TRIPLETS}; label more"
        )
    return counts


def _check_triplets(file: str, known: set[str]) -> int:
    """The number of rows whose images are known. Raises UserError when none is."""
    rows = read_rows(file)
    named = [(row.get("reference", row.get("candidate")), row.get("target", row.get("target_hard"))) for row in rows]
    good = [pair for pair in named if set(pair) <= known]
    if not good:
        example = named[0] if named else "no row"
        raise UserError(f"{file}: no row names two known images, such as {example}; names are file names without suffix")
    if len(good) < len(rows):
        console.print(f"{file}: {len(rows) - len(good)} of {len(rows)} rows name unknown images; they will be rejected")
    return len(good)


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().resolve())
