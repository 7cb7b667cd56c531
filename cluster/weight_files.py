"""Whether files of weights are whole: told by their headers, before anything loads their tensors."""

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path

LFS = b"version https://git-lfs"
INDEX = ".index.json"  # the end of the name of a file that says which shard holds which tensor
ADAPTER, CONFIG = "adapter_config.json", "config.json"
MODELS = ("*.safetensors", "*pytorch_model*.bin")  # of a folder: the first that is there is read, as the libraries do
SMALL = (".json", ".txt", ".model", ".jinja")  # ends of the names of a folder's configs and tokenizers


def damage(path: Path, shards: bool = True) -> str | None:
    """What is wrong with a file, or with the files of a folder: what was found, and what to do. None when they are whole.

    `shards`: whether every file that a folder's index names has to be there, and whole.
    """
    try:
        return _of_folder(path, shards) if path.is_dir() else _of_file(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error}); correct its permissions, or bring it again"


def _of_folder(folder: Path, shards: bool) -> str | None:
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    weights = next((found for pattern in MODELS if (found := fnmatch.filter(names, pattern))), [])
    if ADAPTER in names and all(name.startswith("adapter_model") for name in weights):
        base = _base(folder / ADAPTER)
        return f"{folder} is an adapter without its base{base}; merge the two (PEFT's merge_and_unload) and give that folder"
    if not weights:
        held = ", ".join(names[:5]) or "nothing"
        return f"{folder} holds no weights ({' or '.join(MODELS)}), only {held}; correct the path, 'file', or bring the files"
    small = [name for name in names if Path(name).suffix in SMALL]
    if broken := next(filter(None, (_of_file(folder / name) for name in small)), None):
        return broken
    listed = {shard for name in small if name.endswith(INDEX) for shard in _shards(folder / name)}
    if shards and (missing := sorted(listed.difference(names))):
        return f"{folder} lacks {missing[0]}, {len(missing)} of {len(listed)} shards that its index names; bring all files"
    return next(filter(None, (_of_file(folder / name) for name in weights if shards or name not in listed)), None)


def _base(adapter: Path) -> str:
    try:
        content = json.loads(adapter.read_bytes())
    except ValueError:
        return ""
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return f" ({base})" if base else ""


def _shards(index: Path) -> set[str]:
    """Of a file that `_of_file` has found to be JSON."""
    weight_map = json.loads(index.read_bytes()).get("weight_map")
    return set(weight_map.values()) if isinstance(weight_map, dict) else set()


def _of_file(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(len(LFS))
    if start == LFS:
        return f"{path} is a git-lfs pointer, not the file; `git lfs pull` in its repository brings it"
    check = _json if path.name == CONFIG or path.name.endswith(INDEX) else HEADERS.get(path.suffix)
    if check is None:
        return None
    if not start:
        return f"{path} is empty; bring it again"
    try:
        check(path)
    except Exception as error:  # of a library that was given any bytes
        why = str(error).strip().split("\n")[0][:200] or type(error).__name__
        return f"{path} is cut or no {path.suffix} file ({why}); bring it again"
    return None


def _json(path: Path) -> None:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"found {type(content).__name__}, expected an object")


def _safetensors(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        if not file.keys():
            raise ValueError("it holds no tensor")


def _torch(path: Path) -> None:
    """Of today's format no tensor is read; files of before torch 1.6 have no header, and are read."""
    import zipfile

    import torch

    torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))


def _gguf(path: Path) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    if "tokenizer.ggml.tokens" not in fields:
        raise ValueError("it holds no tokenizer")
    architecture = fields["general.architecture"].contents()
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ValueError(f"transformers reads no GGUF of architecture {architecture!r}")


# what ends the name of a file with tensors -> what raises when the file is not whole
HEADERS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _safetensors,
    ".bin": _torch,
    ".pt": _torch,
    ".pth": _torch,
    ".gguf": _gguf,
}
