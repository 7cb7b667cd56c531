"""Tower outputs for training: cached views, memory-mapped on each node, or the tower run online on fresh views."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.artifacts import Output, fingerprint
from cluster.errors import UserError
from cluster.stage import RunContext, Stage
from mining import tables
from mining.config import TowerConfig, ViewsConfig
from mining.embeddings import INFO, MEAN, plain_parts, read_ids, read_part, view_of
from mining.gallery import encoded_images
from mining.images import render
from mining.scratch import new_array, shared

ORIGIN = np.zeros(1, np.float32)  # what a raw cosine is centred by
ONLINE_VIEWS = 2**15  # as many different views as the schema's int16 can name


@dataclass(frozen=True)
class Online:
    """What is needed to run the tower in training."""

    galleries: tuple[Output, ...]
    tower: TowerConfig
    views: ViewsConfig


@dataclass(frozen=True)
class Features:
    """Where features come from; travels to the workers, which open it.

    `more` are embeddings of further galleries by the same tower; `center` holds the mean, where one is needed.
    """

    embeddings: Output
    online: Online | None = None
    more: tuple[Output, ...] = ()
    center: Output | None = None

    @cached_property
    def mean(self) -> np.ndarray:
        """What features are centred by, float32 [dim]."""
        assert self.center is not None, "whoever centres features says by what"
        return read_mean(self.center)

    @property
    def _outputs(self) -> tuple[Output, ...]:
        return self.embeddings, *self.more

    def open(self, image_ids: np.ndarray) -> "FeatureSource":
        """Features of these images alone: nothing at gallery scale is held in memory."""
        ids = np.unique(image_ids)
        if self.online is not None:
            return OnlineFeatures(self.embeddings, self.online, ids)
        return CachedFeatures(self._outputs, ids, self.embeddings.read_json(INFO)["views"])

    def open_plain(self, image_ids: np.ndarray) -> "CachedFeatures":
        """Plain features of these images alone, which are cached even where the tower runs online in training."""
        return CachedFeatures(self._outputs, np.unique(image_ids), views=1)

    def check(self, image_ids: np.ndarray, where: str) -> None:
        """Raises UserError when an image named in `where` has no embeddings, which no worker could go on without."""
        parts = [read_ids(output, part) for output in self._outputs for part in plain_parts(output)]
        if len(missing := np.setdiff1d(image_ids, np.concatenate(parts))):
            raise _without_embeddings(missing, where, self.embeddings)


def features_of(
    run: RunContext, embeddings: Sequence[Stage], galleries: Sequence[Stage] = (), center: Stage | None = None
) -> Features:
    """Features from some embed stages; from pixels of `galleries` in training, where there are any.

    The first's tower and views are those of all.
    """
    first, *more = map(run.output, embeddings)
    made: Any = embeddings[0]
    online = Online(tuple(map(run.output, galleries)), made.tower, made.views) if galleries else None
    return Features(first, online, tuple(more), run.output(center) if center else None)


class CachedFeatures:
    """Cached views of some images, joined once a node into a memory-mapped array [images, views, tokens, dim].

    Whoever opens the same images of the same outputs uses the same file (`mining.scratch`).
    """

    def __init__(self, embeddings: tuple[Output, ...], image_ids: np.ndarray, views: int) -> None:
        info = embeddings[0].read_json(INFO)
        self.tokens, self.dim, self.views = info["tokens"], info["dim"], views
        self.image_ids = image_ids
        self._values = self._joined(embeddings)

    def _joined(self, embeddings: tuple[Output, ...]) -> np.ndarray:
        key = repr((list(map(_identity, embeddings)), self.views)).encode() + self.image_ids.tobytes()
        return np.load(shared(key, ".npy", partial(self._join, embeddings)), mmap_mode="r")

    def _join(self, embeddings: tuple[Output, ...], path: Path) -> None:
        shape = (len(self.image_ids), self.views, self.tokens, self.dim)
        values = new_array(path, np.float16, shape)
        found = np.zeros(shape[:2], bool)
        parts = [(output, part) for output in embeddings for part in output.parts() if view_of(part) < self.views]
        for source, part in parts:
            ids, rows = read_part(source, part)
            wanted = np.isin(ids, self.image_ids)
            places = np.searchsorted(self.image_ids, ids[wanted])
            values[places, view_of(part)] = rows[wanted]
            found[places, view_of(part)] = True
        if not found.all():
            raise _without_embeddings(self.image_ids[~found.all(axis=1)], "the rows of this stage", embeddings[0])

    def draw_views(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Uniform over the cached views, of which 0 is the plain one."""
        return rng.integers(self.views, size=count)

    def take(self, image_ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Features float32 [count, tokens, dim] of one view of each image. Raises KeyError for an unknown image."""
        return self._values[_places(self.image_ids, image_ids), views].astype(np.float32)


class AugmentedViews:
    """Freshly augmented views as a tower takes them."""

    def __init__(self, online: Online, image_ids: np.ndarray) -> None:
        self.online, self.image_ids = online, image_ids

    @cached_property
    def _images(self) -> Mapping[int, bytes]:
        return encoded_images(self.online.galleries, self.image_ids)

    def draw_views(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """A fresh view each time; the plain one is as rare as any other."""
        return rng.integers(ONLINE_VIEWS, size=count)

    def take(self, image_ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Pixels uint8 [count, size, size, 3] of one view of each image, decoded by as many threads as torch has."""
        import torch

        images, tower, config = self._images, self.online.tower, self.online.views
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            seeds = zip(image_ids.tolist(), views.tolist(), strict=True)
            return np.stack(list(threads.map(lambda seed: render(images[seed[0]], tower, config, seed), seeds)))


class OnlineFeatures:
    """The tower run on `AugmentedViews`."""

    def __init__(self, embeddings: Output, online: Online, image_ids: np.ndarray) -> None:
        info = embeddings.read_json(INFO)
        self.tokens, self.dim, self.views = info["tokens"], info["dim"], ONLINE_VIEWS
        self.online, self.pixels = online, AugmentedViews(online, image_ids)
        self.draw_views = self.pixels.draw_views

    @cached_property
    def _tower(self) -> Callable[[Any], Any]:
        from mining.towers import ImageTower

        return ImageTower(self.online.tower)

    def take(self, image_ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """As `CachedFeatures`; decodes, augments and runs the tower."""
        import torch

        return self._tower(torch.from_numpy(self.pixels.take(image_ids, views))).cpu().numpy()


FeatureSource = CachedFeatures | OnlineFeatures  # raw tower outputs of some images


def _without_embeddings(missing: np.ndarray, where: str, embeddings: Output) -> UserError:
    return UserError(
        f"{where}: {len(missing)} image(s) have no embeddings in {embeddings.uri}, such as image_id {missing[0]}: they are of "
        f"another gallery, or embed rejected them ({embeddings.path('rejects')}); take their rows out, or bring them back"
    )


def _places(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    places = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    if not np.array_equal(sorted_ids[places], ids):
        raise KeyError(f"image {ids[sorted_ids[places] != ids][0]} was not opened with these features")
    return places


def _identity(output: Output) -> tuple[str, object]:
    """An output and the state of its files: one that was made again in the same place is another."""
    return output.uri, fingerprint(output.uri)


def read_mean(output: Output) -> np.ndarray:
    """The centring mean float32 [dim] kept in the output of center or of a model."""
    from safetensors.numpy import load

    return load(output.read_bytes(MEAN))["mean"]


def copy_mean(features: Features, to: Output) -> None:
    """Keep the mean beside a model trained on centred features: it is used unchanged on any other gallery."""
    assert features.center is not None
    to.write_bytes(MEAN, features.center.read_bytes(MEAN))


def centred(values: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(values - mean), each vector of the last axis divided by its norm."""
    shifted = values - mean
    return shifted / np.linalg.norm(shifted, axis=-1, keepdims=True).clip(1e-12)


def mineable_ids(output: Output, mineable: Output | None) -> dict[str, np.ndarray]:
    """Image ids int64 [n] of each plain part of embeddings, of those images alone that no benchmark excludes."""
    parts = {name: read_ids(output, name) for name in plain_parts(output)}
    if mineable is None:
        return parts
    free = {name: mineable.read_table(name, tables.MINEABLE)["image_id"].to_numpy() for name in parts}
    return {name: ids[np.isin(ids, free[name])] for name, ids in parts.items()}


def unit_vectors(output: Output, mean: np.ndarray, mineable: Output | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(image ids int64 [n], float32 [n, dim]) of a gallery's plain view: tokens averaged, less `mean`, of norm 1.

    Of the `mineable` images alone, where they are given. The vectors are memory-mapped, from one file a node
    (`mining.scratch`): they are in no process's own memory.
    """
    kept = mineable_ids(output, mineable)
    ids = np.concatenate(list(kept.values()))

    def write(path: Path) -> None:
        shape, first = (len(ids), output.read_json(INFO)["dim"]), 0
        vectors = new_array(path, np.float32, shape)
        for name, kept_ids in kept.items():
            found, values = read_part(output, name)
            means = values[np.isin(found, kept_ids)].mean(axis=1, dtype=np.float32)
            vectors[first : first + len(means)] = centred(means, mean)
            first += len(means)

    key = repr(("unit", _identity(output))).encode() + mean.tobytes() + ids.tobytes()
    return ids, np.load(shared(key, ".npy", write), mmap_mode="r")
