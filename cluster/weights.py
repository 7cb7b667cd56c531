"""Where pretrained weights come from: a hub at a pinned revision, a local folder, or an installed package."""

import hashlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, version
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
        if sum(source is not None for source in (self.hub, self.folder, self.package)) != 1:
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

    def check(self) -> None:
        """Raises UserError when the weights are missing or other ones, or on a hub that does not give them.

        Of a hub's repository its smallest file is fetched, unless it is in the local cache.
        """
        if self.hub is None:
            self.location()
            return
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError

        try:
            hf_hub_download(self.hub, "config.json", revision=self.revision)
        except RemoteEntryNotFoundError:  # a repository without that file, but there
            return
        except (OSError, ValueError) as error:
            gated = isinstance(error, GatedRepoError)
            reason = "accept its licence on its page of the hub, then `hf auth login`" if gated else str(error).split("\n")[0]
            name = f"'{self.hub}' at revision {self.revision or 'main'}"
            raise UserError(f"weights: {name} is not in the local cache and cannot be fetched: {reason}") from error

    def problem(self) -> str | None:
        """What `check` finds, if anything."""
        try:
            self.check()
        except UserError as error:
            return str(error)
        return None

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
    except ModuleNotFoundError:  # of the package that a dotted name is in
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"weights: Python package '{package}' is not installed; install it on every node")
    return Path(spec.origin).parent


@cache
def _package_version(package: str) -> str | None:
    distributions = packages_distributions().get(package.partition(".")[0])
    return version(distributions[0]) if distributions else None


@cache
def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_in(section: BaseModel, field: str) -> Iterator[tuple[str, Weights]]:
    """(field, weights) of all weights in a section, which the config has at `field`."""
    for name in type(section).model_fields:
        value, place = getattr(section, name), f"{field}.{name}"
        if isinstance(value, Weights):
            yield place, value
        elif isinstance(value, BaseModel):
            yield from weights_in(value, place)
