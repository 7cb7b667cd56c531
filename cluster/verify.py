"""Whether finished outputs are still what their manifests say: nobody works on what was changed or cut."""

import logging
from collections.abc import Iterable
from contextlib import suppress

from cluster.artifacts import Output, fingerprint
from cluster.errors import UserError
from cluster.manifest import Manifest, Part

HASHED = 2**20  # bytes of a part that is compared whole; of a larger one size and footer, and, when it is read, its pages
_log = logging.getLogger(__name__)
_seen: set[str] = set()  # states of outputs that this process has found whole


def verify(outputs: Iterable[Output]) -> None:
    """Raises UserError naming what differs between finished outputs and their manifests, and what to do.

    Weights and other small files, and small parts, are compared by hash; of a large part its size and its footer, with its
    number of rows. What this process has compared is compared again when a file's size or time has changed.
    """
    wrong = {output: found for output in dict.fromkeys(outputs) if (found := _found(output))}
    if wrong:
        lines = [f"  {output.path(line)}" for output, found in wrong.items() for line in found[:5]]
        lines += [f"  {output.path('')}: {len(found) - 5} more" for output, found in wrong.items() if len(found) > 5]
        remedies = [f"  {output.remedy}" for output in wrong]
        raise UserError("\n".join([f"{len(wrong)} finished output(s) are not as they were made:", *lines, *remedies]))


def _found(output: Output) -> list[str]:
    manifest = output.manifest()
    state = repr((output.uri, fingerprint(output.uri)))
    if manifest is None or state in _seen:
        return []
    if not (found := differences(output, manifest)):
        _seen.add(state)
    return found


def differences(output: Output, manifest: Manifest, every_byte: bool = False) -> list[str]:
    """A line for each file that is missing, changed or unknown; parts of any size are read whole where `every_byte` is asked.

    A manifest of an earlier version says nothing of files that are no parts, or in folders.
    """
    sizes, parts, files = output.sizes(), manifest["parts"], manifest.get("files", {})
    there = {name: part for name, part in parts.items() if name in sizes}
    hashed = [name for name, part in there.items() if every_byte or sizes[name] <= HASHED or "footer" not in part]
    hashes = output.hashes([*hashed, *(name for name in files if name in sizes)])
    footers = output.footers([name for name in there if name not in hashes])
    found = {name: part["sha256"] for name, part in parts.items()} | files
    changed = [name for name, value in hashes.items() if value != found[name]]
    for name, footer in footers.items():
        changed += [name] if (sizes[name], footer) != (parts[name]["bytes"], parts[name]["footer"]) else []
    tables = [name for name in sizes if name.endswith(".parquet") and ("/" not in name or "files" in manifest)]
    return [
        *(f"{name} is missing" for name in found if name not in sizes),
        *(f"{name} has changed{_rows(output, name, parts.get(name))}" for name in changed),
        *(f"{name} is not in the manifest" for name in tables if name not in found),
    ]


def _rows(output: Output, name: str, part: Part | None) -> str:
    """Where a part has other rows, how many."""
    with suppress(UserError):
        if part is not None:
            with output.open_parquet(name) as file:
                rows = file.metadata.num_rows
            return f": it has {rows} rows, its manifest says {part['rows']}" if rows != part["rows"] else ""
    return ""


def described(output: Output) -> tuple[dict[str, Part], dict[str, str]]:
    """What a manifest says of an output's parts, and of its other files."""
    rows, sizes = output.part_rows(), output.sizes()
    hashes, footers = output.hashes(list(sizes)), output.footers(list(rows))
    parts = {name: Part(rows=n, bytes=sizes[name], footer=footers[name], sha256=hashes[name]) for name, n in rows.items()}
    return parts, {name: found for name, found in hashes.items() if name not in rows}


def remove_broken(output: Output) -> None:
    """Of an unfinished output remove the tables that do not open, and the part that one stands beside: they are made again."""
    system, _ = output.location
    for name in (name for name in output.files() if name.endswith(".parquet")):
        try:
            with suppress(FileNotFoundError), output.open_parquet(name):  # it may have gone with one that it stands beside
                pass
        except UserError as error:
            _log.warning("%s; it is made again", error)
            for broken in {name, name.rpartition("/")[2]}:
                with suppress(FileNotFoundError):
                    system.delete_file(output.path(broken))
