"""Where pretrained weights come from: a hub at a pinned revision, a local folder, or an installed package."""

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from cluster.artifacts import fingerprint
from cluster.config import CONTENT, Section, path_field
from cluster.errors import UserError
from cluster.weight_files import damage


class Weights(Section):
    """One source of weights. Exactly one of `hub`, `folder` and `package` is given."""

    hub: str | None = Field(None, description="name on the Hugging Face hub")
    revision: str | None = Field(None, description="commit of the hub repository; pin it")
    folder: str | None = path_field("local folder, the same on every node", None)
    package: str | None = Field(None, description="importable name of an installed Python package")
    file: str | None = Field(None, description="file inside the package or folder")
    sha256: str | None = Field(None, description="checked before the file is loaded")

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: str | None) -> str | None:
        """Workers have a current folder of their own."""
        return folder and str(Path(folder).expanduser().resolve())

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [bool(source) for source in (self.hub, self.folder, self.package) if source is not None] != [True]:
            raise ValueError("give exactly one of hub, folder and package")
        if self.sha256 and (self.hub or not self.file):
            raise ValueError("sha256 is that of a local 'file'; a hub's content is pinned by 'revision'")
        return self

    def location(self) -> str:
        """Hub name, or the checked local path of the folder or file.

        Raises UserError when a package or file is missing or has other content than `sha256`.
        """
        if self.hub is not None:
            return self.hub
        path = _package_folder(self.package) if self.package else Path(self.folder or "")
        if self.file:
            path = path / self.file
        if not path.exists():
            raise UserError(f"weights: {path} does not exist; check 'folder', 'package' and 'file'")
        if self.sha256 and sha256_of(path) != self.sha256:
            raise UserError(f"weights: {path} has sha256 {sha256_of(path)}, expected {self.sha256}")
        return str(path)

    def check(self, shards: bool = True) -> None:
        """Raises UserError when the weights are missing, damaged or other ones, or on a hub that does not give them.

        Headers are read, never tensors; `shards` says whether all of a sharded model's files are needed. A hub is asked
        whether it has the repository, unless the local cache has what is needed of it.
        """
        if self.hub is not None:
            if not self._is_cached(shards):
                self._ask_hub()
            return
        path = Path(self.location())
        if not self.sha256 and (found := damage(path, shards)):
            raise UserError(f"weights: {found}")

    def _is_cached(self, shards: bool) -> bool:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(self.hub or "", revision=self.revision, local_files_only=True))
        except (OSError, ValueError):
            return False
        return damage(folder / (self.file or ""), shards) is None

    def _ask_hub(self) -> None:
        """One question, without the retries of a download."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError

        name = f"'{self.hub}' at revision {self.revision or 'main'}"
        try:
            repository = HfApi().model_info(self.hub or "", revision=self.revision, timeout=10)
        except Exception as error:  # whatever the network, or a name that no repository can have, gives
            gated = isinstance(error, GatedRepoError)
            reason = "accept its licence on its page of the hub, then `hf auth login`" if gated else str(error).split("\n")[0]
            raise UserError(f"weights: {name} is not in the local cache and cannot be fetched: {reason}") from error
        if self.file and self.file not in [file.rfilename for file in repository.siblings or ()]:
            raise UserError(f"weights: {name} has no file {self.file!r}; correct 'file'")

    def identity(self) -> dict[str, Any]:
        """What decides the weights' content, never where they lie: as precise as is cheap to find out."""
        if self.sha256:
            return {"sha256": self.sha256}
        if self.hub:
            return {"hub": self.hub, "revision": self.revision, "file": self.file}
        if self.package:
            return {"package": self.package, "version": _package_version(self.package), "file": self.file}
        return {"files": fingerprint(str(Path(self.folder or "") / (self.file or "")))}

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        return self.identity() if info.context == CONTENT else dump(self)


def _package_folder(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of the package that a dotted name is in, or no name at all
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"weights: Python package '{package}' is not installed; install it on every node")
    return Path(spec.origin).parent


@cache
def _package_version(package: str) -> str | None:
    name = package.partition(".")[0]
    with suppress(PackageNotFoundError):
        return version(name)
    distributions = packages_distributions().get(name)  # reads the lists of files of all that is installed
    return version(distributions[0]) if distributions else None


@cache
def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pretrained(Section, ABC):
    """A section that says which library loads which weights, and can say before any work whether it will."""

    @property
    @abstractmethod
    def source(self) -> tuple[str, Weights | None]:
        """Name of the field of its weights, and those; None where the library brings them itself."""

    @property
    def reads_all(self) -> bool:
        """Whether all files of a sharded model are read."""
        return True

    @abstractmethod
    def check_library(self) -> None:
        """Raises UserError, or whatever the library does, when it would not load these weights, which are whole.

        Only what is small is read: config, tokenizer, names and shapes of tensors.
        """

    def check(self) -> None:
        """Raises UserError naming what is missing, damaged, or not what the library takes."""
        name, weights = self.source
        if weights is not None:
            weights.check(self.reads_all)
        try:
            self.check_library()
        except UserError:
            raise
        except Exception as error:  # a library raises what it likes of what is not its own
            why = str(error).strip().split("\n")[0][:300] or type(error).__name__
            place = f" of {weights.location()}" if weights else ""
            raise UserError(f"the library does not take the {name}{place}: {why}; give others, or correct 'library'") from error


def models_in(section: BaseModel, field: str) -> Iterator[tuple[str, Pretrained | Weights]]:
    """(field of the weights, what can check them) of all pretrained models in a section, which the config has at `field`."""
    if isinstance(section, Pretrained):
        yield f"{field}.{section.source[0]}", section
        return
    for name in type(section).model_fields:
        value, place = getattr(section, name), f"{field}.{name}"
        if isinstance(value, Weights):
            yield place, value
        elif isinstance(value, BaseModel):
            yield from models_in(value, place)
