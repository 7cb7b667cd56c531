"""What a finished output's `manifest.json` holds, and reading it: what was changed since it was written is no manifest."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from cluster.errors import shown

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Instance = Annotated[str, Field(pattern=r"^[a-z_]+:[^/\x00-\x1f]+$")]


class Named(TypedDict):
    """An output, by its stage's instance."""

    instance: Instance
    digest: Digest


class Part(TypedDict):
    """A file of the main table. Earlier versions say nothing of its size and its Parquet footer."""

    rows: Count
    bytes: NotRequired[Count]
    footer: NotRequired[Sha256]
    sha256: Sha256


@with_config(ConfigDict(extra="forbid"))
class Manifest(Named):
    """What an output is, what it was made from, and its files. What is not required earlier versions do not say."""

    version: int
    settings: dict[str, Any]
    parents: dict[str, Named]
    sources: dict[str, str]
    rows: Count
    rejects: dict[str, Count]
    seconds: float
    startup_seconds: NotRequired[float]
    code: NotRequired[dict[str, Any]]
    environment: NotRequired[list[dict[str, Any]]]
    reused: NotRequired[dict[str, Count]]
    warnings: NotRequired[list[str]]  # what the stage found odd in what it made
    parts: dict[str, Part]
    files: NotRequired[dict[str, Sha256]]
    seal: NotRequired[Digest]  # over all the rest


_MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def sealed(manifest: Manifest) -> Manifest:
    """With the digest over what it says."""
    return {**manifest, "seal": digest_of(_rest(manifest))}


def parse(content: Any) -> Manifest:
    """Raises ValueError that says what is wrong with the content of a manifest's file."""
    manifest = checked(_MANIFEST, content)
    said = manifest.get("seal")
    if said is not None and said != digest_of(_rest(manifest)):
        raise ValueError("it is not as it was written")
    return manifest


def checked(kind: TypeAdapter[Any], content: Any) -> Any:
    """What JSON gave, as `kind` has it. Raises ValueError that names the first wrong field."""
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'content'}: {shown(first['msg'])}") from None


def digest_of(content: Any) -> str:
    """12 hex digits over what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _rest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != "seal"}
