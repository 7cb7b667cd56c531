"""What composed retrieval gives the training loop: labelled and pseudo triplets joined with what the model sees of images."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from cir import metrics
from cir.config import Validation, VariantConfig
from cir.select import Pseudo, chosen
from cluster.artifacts import Output
from cluster.errors import UserError
from mining import tables
from mining.features import Features, centred

VALIDATION_BATCH = 512


@dataclass(frozen=True)
class Rows:
    """Triplets as arrays: the deltas of row i are `texts[offsets[i] : offsets[i + 1]]`."""

    reference_ids: np.ndarray
    target_ids: np.ndarray
    offsets: np.ndarray
    texts: pa.Array

    @classmethod
    def of(cls, table: pa.Table) -> "Rows":
        """Rows of a table of tables.TRIPLETS."""
        deltas = table["deltas"].combine_chunks()
        offsets = np.concatenate([[0], np.cumsum(deltas.value_lengths().to_numpy())]).astype(np.int64)
        return cls(table["reference_id"].to_numpy(), table["target_id"].to_numpy(), offsets, deltas.flatten())

    def __len__(self) -> int:
        return len(self.reference_ids)

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> list[str]:
        """One of each row's deltas, drawn uniformly."""
        starts = self.offsets[rows]
        return self.texts.take(pa.array(starts + rng.integers(self.offsets[rows + 1] - starts))).to_pylist()

    def first(self) -> list[str]:
        """The first delta of each row."""
        return self.texts.take(pa.array(self.offsets[:-1])).to_pylist()


def held_out(triplet_ids: np.ndarray, validation: Validation) -> np.ndarray:
    """bool [n]: whether each triplet is of the held-out fold, by a stable hash of its id."""
    if not validation.folds:
        return np.zeros(len(triplet_ids), bool)
    return np.array([tables.stable_id("fold", i) % validation.folds == validation.fold for i in triplet_ids.tolist()], bool)


@dataclass(frozen=True)
class Gallery:
    """Embeddings of the mined gallery, and which of its images no benchmark excludes; `loss.unlabelled` draws from it."""

    embeddings: Output
    mineable: Output | None


@dataclass
class TripletTask(ABC):
    """The `cluster.training.loop.Task` of one variant, whatever its model takes. Holds settings and paths, loads lazily.

    An epoch is the labelled triplets; with pseudo triplets each labelled row brings one of them, drawn with replacement,
    uniformly (PAPER 3.3) or by weight, so |B| = |B'|. With `pseudo_only` the epoch is the pseudo triplets.
    """

    sees_pixels: ClassVar[bool] = False  # of references and targets in training; else the features of train.tower

    features: Features
    triplets: Output
    pseudo: Pseudo | None
    config: VariantConfig
    gallery: Gallery | None = None

    def __post_init__(self) -> None:
        self.best_metric = "val_mrr" if self.config.validation.folds else None

    @staticmethod
    @abstractmethod
    def untrained(content: Mapping[str, Any], config: VariantConfig, texts: Iterable[str] | None = None) -> Any:
        """The module to load a trained model's weights into; `content` is its `cir.json`, `texts` are all that will come."""

    @abstractmethod
    def build(self) -> Any:
        """The module to train."""

    @abstractmethod
    def _drawn(self, image_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A drawn view of each image, as the module takes images."""

    @abstractmethod
    def _plain(self, image_ids: np.ndarray) -> np.ndarray:
        """The plain view of images that are trained on, as the module takes images."""

    def _held_out_references(self, image_ids: np.ndarray) -> np.ndarray:
        """The plain view of images of the labelled triplets, as the module takes references."""
        return self._plain(image_ids)

    @abstractmethod
    def _text(self, texts: list[str]) -> Any:
        """Deltas as the module takes them."""

    @cached_property
    def _labelled(self) -> pa.Table:
        return self.triplets.read_parts(tables.TRIPLETS)

    @cached_property
    def _is_held_out(self) -> np.ndarray:
        return held_out(self._labelled["triplet_id"].to_numpy(), self.config.validation)

    @cached_property
    def _tables(self) -> list[pa.Table]:
        """Training triplets: the rows of an epoch, then the pseudo triplets that join them, if any."""
        labelled = self._labelled.filter(pa.array(~self._is_held_out))
        if self.pseudo is None:
            return [labelled]
        pseudo, _ = self._chosen
        return [pseudo] if self.config.pseudo_only else [labelled, pseudo]

    @cached_property
    def _chosen(self) -> tuple[pa.Table, np.ndarray]:
        """The pseudo triplets that are used, their deltas permuted when the config says so, and the running sum of the
        probabilities of drawing them.
        """
        assert self.pseudo is not None
        config = self.config
        table, weights = chosen(self.pseudo, len(tables.images_of(self._labelled)), config.selection)
        if config.shuffle_deltas:
            order = np.random.default_rng(config.selection.seed).permutation(len(table))
            table = table.set_column(table.schema.get_field_index("deltas"), "deltas", table["deltas"].take(pa.array(order)))
        weights = np.full(len(table), 1 / len(table)) if weights is None else weights
        return table, np.cumsum(weights)

    @cached_property
    def _rows(self) -> Rows:
        return Rows.of(pa.concat_tables(self._tables))

    @cached_property
    def _validation(self) -> Rows:
        return Rows.of(self._labelled.filter(pa.array(self._is_held_out)))

    @property
    def _images(self) -> np.ndarray:
        """Ids of the images that are trained on, some repeated."""
        return np.concatenate([self._rows.reference_ids, self._rows.target_ids])

    @property
    def size(self) -> int:
        """Rows of an epoch."""
        return len(self._tables[0])

    def check(self) -> tuple[int, int]:
        """Numbers of labelled and of pseudo triplets that are trained on.

        Raises UserError when there is none, an image has no features, or all have one target image: it is no query's negative.
        """
        held = self.config.validation
        if not self.size:
            raise UserError(f"train.validation: fold {held.fold} of {held.folds} holds out all triplets of {self.triplets.uri}")
        if not self.config.loss.reference_negative and len(np.unique(self._rows.target_ids)) == 1:
            raise UserError(
                f"train.triplets: all {len(self._rows)} triplets have the same target image; label other targets too"
            )
        self.features.check(self._images, f"train.triplets ({self.triplets.uri}) or the pseudo triplets")
        pseudo = len(self._tables[-1]) if self.pseudo is not None else 0
        return len(self._rows) - pseudo, pseudo

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Images and texts as the module takes them, and the images' ids; labelled rows first, then pseudo ones."""
        import torch

        supervised = len(rows)
        if len(self._tables) == 2:
            _, cumulative = self._chosen
            drawn = np.searchsorted(cumulative, rng.random(supervised) * cumulative[-1], side="right")
            rows = np.concatenate([rows, self.size + drawn.clip(max=len(cumulative) - 1)])
        reference_ids, target_ids = self._rows.reference_ids[rows], self._rows.target_ids[rows]
        reference = self._drawn(reference_ids, rng)
        target = self._drawn(target_ids, rng) if self.config.augment_target else self._plain(target_ids)
        return {
            "reference": torch.from_numpy(reference),
            "target": torch.from_numpy(target),
            "reference_id": torch.from_numpy(reference_ids),
            "target_id": torch.from_numpy(target_ids),
            "text": self._text(self._rows.draw(rows, rng)),
            "supervised": supervised,
        }

    @cached_property
    def _gallery(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], prepared plain features [n, dim]) of the images named in the labelled triplets."""
        ids = tables.images_of(self._labelled)
        plain = self.features.open_plain(ids)
        return ids, self._prepared(plain.take(ids, np.zeros(len(ids), np.int64)))

    def _prepared(self, values: np.ndarray) -> np.ndarray:
        """[n, 1, dim] as queries are compared with it: [n, dim], centred when the config says so."""
        return centred(values[:, 0], self.features.mean) if self.config.center else values[:, 0]

    def validate(self, module: Any) -> dict[str, float]:
        """R@1, R@10 and MRR in percent of the held-out triplets' exact targets among `_gallery`, the reference removed."""
        import torch

        rows = self._validation
        if not len(rows):
            return {}
        ids, values = self._gallery
        place, texts = next(module.parameters()).device, rows.first()
        queries = [
            module.compose(
                torch.from_numpy(self._held_out_references(rows.reference_ids[i : i + VALIDATION_BATCH])).to(place),
                self._text(texts[i : i + VALIDATION_BATCH]).to(place),
            )
            for i in range(0, len(rows), VALIDATION_BATCH)
        ]
        targets = values[np.searchsorted(ids, rows.target_ids)]
        ranked = metrics.rank(
            torch.cat(queries).float().cpu().numpy(), [(ids, values)], rows.reference_ids, rows.target_ids, targets, top=1
        )
        return {
            "val_R@1": metrics.recall(ranked.target_rank, 1),
            "val_R@10": metrics.recall(ranked.target_rank, 10),
            "val_mrr": metrics.mean_reciprocal_rank(ranked.target_rank),
        }
