"""Searching a gallery with trained models: a reference image and a text give images and scores. No HTTP, no Ray."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cir.compose import Composer
from cir.metrics import unit
from cir.tasks import TASKS
from cir.train import MODEL
from cluster.artifacts import Output
from cluster.errors import UserError
from mining import tables
from mining.config import TowerConfig
from mining.embeddings import plain_parts, read_ids
from mining.features import Features, FeatureSource, read_mean, unit_vectors
from mining.gallery import read_images
from mining.images import decode, plain
from mining.indexes import filled, trained
from mining.scratch import shared
from mining.search import Exact, Lists, Search

EXACT_PHOTOS = 20_000  # one query over larger galleries goes through inverted lists
LISTS_A_SEARCHED = 16  # of so many lists one is searched: a composed query lies farther from the gallery than its own images do


@dataclass(frozen=True)
class Reference:
    """An image to start from, as models take it."""

    image_id: int | None  # where it is in the gallery
    vector: np.ndarray  # float32 [dim], as the tower gives it
    pixels: np.ndarray | None = None  # uint8 [size, size, 3], for models that take pixels


@dataclass(frozen=True)
class Hits:
    """Images of the gallery, best first."""

    image_ids: np.ndarray  # int64 [n]
    scores: np.ndarray  # float32 [n], cosines


class Matrix:
    """Unit vectors of a gallery, which single queries are compared with: all of them, or those of FAISS's lists.

    The lists lie on the node's disk (`mining.scratch`): they are made once.
    """

    def __init__(self, image_ids: np.ndarray, vectors: np.ndarray) -> None:
        self.image_ids, self.vectors = image_ids, vectors
        self.search: Search = Exact(vectors) if len(vectors) <= EXACT_PHOTOS else _lists(vectors)

    def nearest(self, query: np.ndarray, top: int, without: int | None) -> Hits:
        """The best of one unit query float32 [dim], without one image."""
        return self.nearest_of(query[None], [top], [without])[0]

    def nearest_of(self, queries: np.ndarray, tops: Sequence[int], without: Sequence[int | None]) -> list[Hits]:
        """As `nearest`, of queries float32 [n, dim] at a time, each with its own number of images and the one left out."""
        rows, scores = self.search(queries, min(max(tops) + 1, len(self.vectors)))
        return [self._hits(*found) for found in zip(self.image_ids[rows], scores, tops, without, strict=True)]

    def _hits(self, ids: np.ndarray, scores: np.ndarray, top: int, without: int | None) -> Hits:
        kept = np.isfinite(scores) & (ids != without)
        return Hits(ids[kept][:top], scores[kept][:top])


def _lists(vectors: np.ndarray) -> Lists:
    """Filled lists. Their centroids lie beside them: a service that starts again does not train them again."""
    import faiss

    content = hashlib.sha256(b"centroids")
    content.update(np.ascontiguousarray(vectors).data)
    path = shared(content.digest(), ".index", lambda made: faiss.write_index(trained(vectors, None), str(made)))
    lists = filled(faiss.read_index(str(path)), vectors, on_disk=True)
    lists.nprobe = -(-lists.nlist // LISTS_A_SEARCHED)
    return Lists(vectors, lists)


class Encoder:
    """An image tower at work on single images; it is loaded when the first is encoded."""

    def __init__(self, tower: TowerConfig) -> None:
        self.tower = tower
        self._loading = Lock()
        self._loaded: Any = None

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 [size, size, 3], as the tower takes them."""
        return np.asarray(plain(image, self.tower))

    def vector(self, image: Image.Image) -> np.ndarray:
        """float32 [dim] of an RGB image, rounded as cached embeddings are."""
        return self.encode(self.pixels(image))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """As `vector`, of what the tower takes of the image."""
        vector: np.ndarray = self.vectors(pixels[None])[0]
        return vector

    def vectors(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [n, dim] of images uint8 [n, size, size, 3]."""
        import torch

        return self.load()(torch.from_numpy(pixels.copy())).half().float().cpu().numpy()[:, 0]

    def load(self) -> Any:
        """The tower."""
        with self._loading:
            if self._loaded is None:
                from mining.towers import ImageTower

                self._loaded = ImageTower(self.tower)
        return self._loaded


class Model:
    """A trained model alone, without the gallery that it was evaluated on: what an export holds."""

    def __init__(self, model: Output, tower: TowerConfig) -> None:
        self.encoder = Encoder(tower)
        self._composer = Composer(model, model, model)  # neither embeddings nor images of a gallery are read

    def query(self, image: Image.Image, text: str) -> np.ndarray:
        """float32 [dim] of norm 1: what is wanted, from a reference and what should change."""
        pixels = self.encoder.pixels(image) if self._composer.takes_pixels else None
        return _queries(self._composer, [(Reference(None, self.encoder.vector(image), pixels), text)])[0]

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 [n, dim] of norm 1 of images to search in: `images(...) @ query(...)` are their scores."""
        return unit(self._composer.prepare(self.encoder.vectors(np.stack([self.encoder.pixels(image) for image in images]))))


def _queries(composer: Composer, asked: Sequence[tuple[Reference, str]]) -> np.ndarray:
    """float32 [n, dim] of norm 1."""
    if composer.takes_pixels:
        images = np.stack([cast(np.ndarray, reference.pixels) for reference, _ in asked])
    else:
        images = composer.prepare(np.stack([reference.vector for reference, _ in asked]))
    return unit(composer.compose(images, [text for _, text in asked]))


class Searcher:
    """Trained models over one embedded gallery. Each is loaded when it is first asked for.

    Models that centre with one mean share one matrix, which is memory-mapped. Threads may share a searcher.
    """

    def __init__(self, models: Mapping[str, Output], embeddings: Output, gallery: Output, tower: TowerConfig) -> None:
        self.models, self.embeddings, self.gallery, self.encoder = models, embeddings, gallery, Encoder(tower)
        self._loading = Lock()
        self._composers: dict[str, Composer] = {}
        self._matrices: dict[bytes, Matrix] = {}  # by the mean
        self._matrix_of: dict[str, Matrix] = {}

    def __reduce__(self) -> tuple[type["Searcher"], tuple[Mapping[str, Output], Output, Output, TowerConfig]]:
        """Another process loads its own."""
        return Searcher, (self.models, self.embeddings, self.gallery, self.encoder.tower)

    def composer(self, name: str) -> Composer:
        """A model, loaded. Raises UserError when there is none of this name."""
        if name not in self.models:
            raise UserError(f"model {name}: there is none of this name; give one of {', '.join(self.models)}")
        with self._loading:
            if name not in self._composers:
                self._composers[name] = Composer(self.models[name], self.embeddings, self.gallery)
            return self._composers[name]

    def matrix(self, name: str) -> Matrix:
        """What a model's queries are compared with."""
        with self._loading:
            if name not in self._matrix_of:
                mean = self._mean(name)
                if mean.tobytes() not in self._matrices:
                    self._matrices[mean.tobytes()] = Matrix(*unit_vectors(self.embeddings, mean))
                self._matrix_of[name] = self._matrices[mean.tobytes()]
            return self._matrix_of[name]

    def _mean(self, name: str) -> np.ndarray:
        model = self.models[name]
        content = model.read_json(MODEL)
        return read_mean(model) if content["config"]["center"] else np.zeros(content["dim"], np.float32)

    @cached_property
    def _rows(self) -> pa.Table:
        return self.gallery.read_parts(tables.GALLERY, ["image_id", "key", "sha256"]).combine_chunks()

    @cached_property
    def _places(self) -> dict[int, int]:
        return {image_id: row for row, image_id in enumerate(self._rows["image_id"].to_pylist())}

    def keys(self, image_ids: np.ndarray) -> list[str]:
        """Names of images in their source. Raises KeyError for one that is not in the gallery."""
        names = self._rows["key"]
        return [names[self._places[i]].as_py() for i in image_ids.tolist()]  # `take` would let go of the interpreter, and wait

    def image_id(self, key: str) -> int:
        """The id of an image by its name. Raises UserError when the gallery has none of it."""
        found = self._find("key", key)
        if found is None:
            raise UserError(f"{key}: no image of the gallery ({self.gallery.uri}) has this name")
        return found

    def _find(self, column: str, value: str) -> int | None:
        row = pc.index(self._rows[column], value).as_py()
        return None if row < 0 else self._rows["image_id"][row].as_py()

    def known(self, image_id: int) -> Reference:
        """An image of the gallery, with the features that the models were evaluated on. Raises KeyError for any other id."""
        vector = self.tokens(image_id)[0]
        return Reference(image_id, vector, self.encoder.pixels(self.image(image_id)) if self._takes_pixels else None)

    def tokens(self, image_id: int) -> np.ndarray:
        """float32 [tokens, dim] of an image of the gallery. Raises KeyError."""
        return self._plain.take(np.array([image_id]), np.zeros(1, np.int64))[0]

    def image(self, image_id: int) -> Image.Image:
        """An image of the gallery, RGB. Raises KeyError."""
        return decode(read_images((self.gallery,), [image_id])[image_id])

    def uploaded(self, content: bytes, pixels: np.ndarray) -> Reference:
        """Any image, as a file and as the encoder's `pixels`; where the same file is in the gallery, that image."""
        found = self._find("sha256", hashlib.sha256(content).hexdigest())
        return Reference(found, self.encoder.encode(pixels), pixels if self._takes_pixels else None)

    @cached_property
    def _takes_pixels(self) -> bool:
        return any(TASKS[model.read_json(MODEL)["config"]["model"]].sees_pixels for model in self.models.values())

    @cached_property
    def _plain(self) -> FeatureSource:
        parts = [read_ids(self.embeddings, part) for part in plain_parts(self.embeddings)]
        return Features(self.embeddings).open_plain(np.concatenate(parts))

    def compose(self, name: str, asked: Sequence[tuple[Reference, str]]) -> np.ndarray:
        """A model's queries float32 [n, dim] of norm 1."""
        return _queries(self.composer(name), asked)

    def search(self, name: str, reference: Reference, text: str, top: int, remove_reference: bool = True) -> Hits:
        """The `top` images of the gallery for a reference and what should change, as one model ranks them."""
        (query,) = self.compose(name, [(reference, text)])
        return self.matrix(name).nearest(query, top, reference.image_id if remove_reference else None)
