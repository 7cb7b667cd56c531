"""Tower outputs for training: cached views, memory-mapped on each node, or the tower run online on fresh views."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from cluster.artifacts import Output
from mining.config import TowerConfig, ViewsConfig
from mining.embed import INFO, MEAN, plain_parts, read_part, view_of
from mining.gallery import read_images
from mining.images import render

ONLINE_VIEWS = 2**15  # as many different views as the schema's int16 can name


class FeatureSource(Protocol):
    """Raw tower outputs of a set of images."""

    mean: np.ndarray  # float32 [dim], of the training gallery
    tokens: int
    dim: int

    def draw_views(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` random views; 0 is the plain image."""

    def take(self, image_ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Features float32 [count, tokens, dim] of one view of each image. Raises KeyError for an unknown image."""


@dataclass(frozen=True)
class Online:
    """What is needed to run the tower in training."""

    galleries: tuple[Output, ...]
    tower: TowerConfig
    views: ViewsConfig


@dataclass(frozen=True)
class Features:
    """Where features come from; travels to the workers, which open it.

    `more` are embeddings of further galleries by the same tower; the mean is that of the first gallery alone.
    """

    embeddings: Output
    online: Online | None = None
    more: tuple[Output, ...] = ()

    def open(self, image_ids: np.ndarray) -> FeatureSource:
        """Features of these images alone: nothing at gallery scale is held in memory."""
        ids = np.unique(image_ids)
        if self.online is not None:
            return OnlineFeatures(self.embeddings, self.online, ids)
        return CachedFeatures((self.embeddings, *self.more), ids)


class CachedFeatures:
    """Cached views of some images, joined once a node into a memory-mapped array [images, views, tokens, dim]."""

    def __init__(self, embeddings: tuple[Output, ...], image_ids: np.ndarray) -> None:
        info = embeddings[0].read_json(INFO)
        self.tokens, self.dim, self.views = info["tokens"], info["dim"], info["views"]
        self.mean = read_mean(embeddings[0])
        self.image_ids = image_ids
        self._values = self._joined(embeddings)

    def _joined(self, embeddings: tuple[Output, ...]) -> np.ndarray:
        name = hashlib.sha256(repr(embeddings).encode() + self.image_ids.tobytes()).hexdigest()[:24]
        path = Path(tempfile.gettempdir()) / "vdg-features" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                self._join(embeddings, path)
        return np.load(path, mmap_mode="r")

    def _join(self, embeddings: tuple[Output, ...], path: Path) -> None:
        shape = (len(self.image_ids), self.views, self.tokens, self.dim)
        partial = path.with_suffix(".partial")
        values = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        found = np.zeros(shape[:2], bool)
        for source, part in [(output, part) for output in embeddings for part in output.parts()]:
            ids, rows = read_part(source, part)
            wanted = np.isin(ids, self.image_ids)
            places = np.searchsorted(self.image_ids, ids[wanted])
            values[places, view_of(part)] = rows[wanted]
            found[places, view_of(part)] = True
        if not found.all():
            missing = self.image_ids[~found.all(axis=1)]
            raise KeyError(f"{len(missing)} images have no embeddings in {embeddings[0].uri}, such as {missing[0]}")
        values.flush()
        partial.rename(path)

    def draw_views(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform over the cached views."""
        return rng.integers(self.views, size=count)

    def take(self, image_ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Rows of the memory-mapped array."""
        return self._values[_places(self.image_ids, image_ids), views].astype(np.float32)


class OnlineFeatures:
    """The tower run on freshly augmented views; the encoded images asked for are held in memory."""

    def __init__(self, embeddings: Output, online: Online, image_ids: np.ndarray) -> None:
        info = embeddings.read_json(INFO)
        self.tokens, self.dim = info["tokens"], info["dim"]
        self.mean = read_mean(embeddings)
        self.online, self.image_ids = online, image_ids

    @cached_property
    def _images(self) -> dict[int, bytes]:
        return read_images(self.online.galleries, self.image_ids)

    @cached_property
    def _tower(self) -> Callable[[Any], Any]:
        from mining.towers import ImageTower

        return ImageTower(self.online.tower)

    def draw_views(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """A fresh view each time; the plain one is as rare as any other."""
        return rng.integers(ONLINE_VIEWS, size=count)

    def take(self, image_ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Decode, augment and run the tower."""
        import torch

        online = self.online
        seeds = zip(image_ids.tolist(), views.tolist(), strict=True)
        pixels = np.stack([render(self._images[seed[0]], online.tower, online.views, seed) for seed in seeds])
        return self._tower(torch.from_numpy(pixels)).cpu().numpy()


def _places(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    places = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    if not np.array_equal(sorted_ids[places], ids):
        raise KeyError(f"image {ids[sorted_ids[places] != ids][0]} was not opened with these features")
    return places


def read_mean(output: Output) -> np.ndarray:
    """The centring mean float32 [dim] kept in an embeddings or model output."""
    from safetensors.numpy import load

    return load(output.read_bytes(MEAN))["mean"]


def copy_mean(source: Output, to: Output) -> None:
    """Keep a gallery's mean beside a model trained on it: it is used unchanged on any other gallery."""
    to.write_bytes(MEAN, source.read_bytes(MEAN))


def centred(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(values - mean), each vector of the last axis divided by its norm."""
    shifted = values - mean
    return shifted / np.linalg.norm(shifted, axis=-1, keepdims=True).clip(1e-12)


def plain_embeddings(output: Output) -> tuple[np.ndarray, np.ndarray]:
    """(image ids [n], float32 [n, tokens, dim]) of a whole gallery's plain view; for galleries that fit memory."""
    parts = [read_part(output, name) for name in plain_parts(output)]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([values for _, values in parts]).astype(np.float32)
