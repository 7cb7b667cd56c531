"""Tar files of images: their members, links among them, and the names that a WebDataset gives its images."""

import posixpath
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa

from cluster.files import is_hidden
from mining.images import has_suffix

CAPTION_SUFFIXES = (".txt", ".json")


@dataclass
class Members:
    """The files of a tar, as far as it can be read."""

    files: list[tuple[str, int, int]] = field(default_factory=list)  # name, offset, length
    links: dict[str, tuple[str, bool]] = field(default_factory=dict)  # name -> another's, whether it is a symbolic one
    broken: list[tuple[str, str]] = field(default_factory=list)  # name, why it cannot be read
    special: int = 0
    error: str | None = None  # why the rest cannot be read


def read_members(stream: pa.NativeFile) -> Members:
    """The members of a tar: a header may claim more than there is, or be broken, and the members before it are still good."""
    found, read = Members(), -1
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
                if member.size < 0 or archive.offset <= read:  # it would lead back, and round and round
                    raise tarfile.ReadError(f"the header of {member.name} says a negative size")
                _keep(member, stream.size(), found)
                read = archive.offset
            if stream.read_at(tarfile.BLOCKSIZE, archive.offset).strip(tarfile.NUL):  # a broken header is taken for the end
                raise tarfile.ReadError(f"the header at byte {archive.offset} is broken")
            behind = range(archive.offset, stream.size(), 1 << 20)
            if any(stream.read_at(1 << 20, at).strip(tarfile.NUL) for at in behind):  # zeros fill a tar up
                raise tarfile.ReadError("it goes on behind its end, as joined tars do: give each as a file of its own")
    except (OSError, ValueError, MemoryError, OverflowError, tarfile.TarError) as error:
        found.error = str(error).strip() or type(error).__name__
    return found


def _keep(member: tarfile.TarInfo, size: int, found: Members) -> None:
    if member.islnk() or member.issym():
        target = posixpath.join(posixpath.dirname(member.name), member.linkname) if member.issym() else member.linkname
        found.links[member.name] = posixpath.normpath(target), member.issym()
    elif member.isfile() and member.issparse():
        found.broken.append((member.name, "it is stored sparsely"))
    elif member.isfile() and member.offset_data + member.size > size:
        found.broken.append((member.name, f"its header claims {member.size:,} bytes, which the file does not hold"))
    elif member.isfile():
        found.files.append((member.name, member.offset_data, member.size))
    elif not member.isdir():
        found.special += 1


def resolve(found: Members) -> tuple[list[tuple[str, int, int]], int]:
    """Linked members (name, offset, length), and the number of symbolic links to images that have a name of their own.

    Links without an end become broken members.
    """
    places = {posixpath.normpath(name): (name, offset, length) for name, offset, length in found.files}
    links = {posixpath.normpath(name): target for name, (target, _) in found.links.items()}
    members, again = [], 0
    for name, (target, symbolic) in found.links.items():
        for _ in range(len(links)):
            if target in places or target not in links:
                break
            target = links[target]
        if target not in places:
            found.broken.append((name, f"it links to {target!r}, which is not in the file"))
        elif symbolic and has_suffix(target) and not is_hidden(target):
            again += 1
        else:
            members.append((name, *places[target][1:]))
    return members, again


def naming(names: Iterable[str]) -> Callable[[str], str]:
    """What gives a member's key: its name without its suffix.

    In a WebDataset whose images and captions meet there alone it ends at the first dot of the file's name: `a.image.jpg` and
    `a.caption.txt` are both `a`.
    """
    shown = [name for name in names if has_suffix(name) or PurePosixPath(name).suffix.lower() in CAPTION_SUFFIXES]
    images, texts = [n for n in shown if has_suffix(n)], [n for n in shown if not has_suffix(n)]
    if {_to_last_dot(n) for n in images} & {_to_last_dot(n) for n in texts}:
        return _to_last_dot
    keys = {_to_first_dot(n) for n in images}
    meet = keys & {_to_first_dot(n) for n in texts}
    return _to_first_dot if meet and len(keys) == len({_to_last_dot(n) for n in images}) else _to_last_dot


def _to_last_dot(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _to_first_dot(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name[:1] + path.name[1:].partition(".")[0]))
