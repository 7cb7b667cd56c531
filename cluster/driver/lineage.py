"""What made an output and what was made from it, read from the manifests below a root; and whether its files are whole."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from pyarrow import fs as pafs

from cluster.artifacts import AUTHORS, Output, filesystem, output_of, outputs_of
from cluster.manifest import Manifest
from cluster.verify import differences


@dataclass(frozen=True)
class Made:
    """An output that some manifest names. It has no manifest of its own when it was removed after its children were made."""

    instance: str
    digest: str
    output: Output
    manifest: Manifest | None

    @property
    def name(self) -> str:
        """`instance-digest`, one of its kind below a root."""
        return f"{self.instance}-{self.digest}"

    @cached_property
    def authors(self) -> dict[str, int]:
        """Whose labels it took in, and how many of each, where its sources say it."""
        told = self.manifest is not None and AUTHORS in self.manifest.get("files", {})
        return dict(self.output.read_json(AUTHORS)) if told else {}

    @property
    def rows(self) -> str:
        """How many rows it has, where it is a table."""
        if self.manifest is None:
            return "removed"
        return f"{self.manifest['rows']:,} rows" if self.manifest["rows"] else ""

    @property
    def whose(self) -> str:
        """Whose labels are among its rows."""
        return ", ".join(f"{count:,} by {author}" for author, count in self.authors.items())


class Lineage:
    """Every finished output below a root, and the edges between them."""

    def __init__(self, root: str) -> None:
        """Reads every manifest below `root`, `<root>/<stage>/<instance>-<digest>/manifest.json`."""
        self.root = root
        self.made: dict[str, Made] = {}
        self.parents: dict[str, dict[str, str]] = {}  # name -> role -> the parent's name
        system, base = filesystem(root)
        folders = system.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        for kind in (folder.base_name for folder in folders if folder.type == pafs.FileType.Directory):
            for output in outputs_of(root, kind):
                if (manifest := output.manifest()) is not None:
                    self._add(root, output, manifest)

    def _add(self, root: str, output: Output, manifest: Manifest) -> None:
        made = Made(manifest["instance"], manifest["digest"], output, manifest)
        self.made[made.name] = made
        self.parents[made.name] = {}
        for role, parent in manifest["parents"].items():
            gone = output_of(root, parent["instance"], parent["digest"])
            removed = Made(parent["instance"], parent["digest"], gone, None)
            self.made.setdefault(removed.name, removed)
            self.parents[made.name][role] = removed.name

    def find(self, wanted: str) -> list[Made]:
        """Outputs by `instance-digest`, digest, instance or model name; a pattern may match several.

        The model name of `train:semi.s1` is `semi.s1`.
        """
        found = []
        for name, made in sorted(self.made.items()):
            kind, _, model = made.instance.partition(":")
            names = (name, made.digest, made.instance, *([model] if kind == "train" else []))
            found += [made] if any(fnmatchcase(known, wanted) for known in names) else []
        return found

    def above(self, made: Made) -> list[tuple[str, Made]]:
        """(role, parent) of what an output was made from."""
        return [(role, self.made[name]) for role, name in self.parents.get(made.name, {}).items()]

    def below(self, made: Made) -> list[tuple[str, Made]]:
        """(role, child) of what was made from an output: the role that it has there."""
        edges = ((role, child, name) for child, roles in self.parents.items() for role, name in roles.items())
        return sorted(((role, self.made[child]) for role, child, name in edges if name == made.name), key=lambda e: e[1].name)

    def ancestors(self, made: Made) -> dict[str, Made]:
        """An output with all that it was made from, by name."""
        return _reach(made, self.above)

    def around(self, made: Made) -> dict[str, Made]:
        """An output with all its ancestors and descendants, by name."""
        return self.ancestors(made) | _reach(made, self.below)


def _reach(made: Made, step: Callable[[Made], list[tuple[str, Made]]]) -> dict[str, Made]:
    found, waiting = {made.name: made}, [made]
    while waiting:
        new = {near.name: near for _, near in step(waiting.pop()) if near.name not in found}
        found |= new
        waiting += new.values()
    return found


def problems(made: Made) -> list[str]:
    """What differs between an output's files, read whole, and its manifest: a line for each."""
    if made.manifest is None:
        return [f"{made.name}: was removed"]
    return [f"{made.name}: {line}" for line in differences(made.output, made.manifest, every_byte=True)]
