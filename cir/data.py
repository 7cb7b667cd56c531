"""What composed retrieval gives the training loop: labelled and pseudo triplets joined with frozen features."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from cir import metrics
from cir.config import Validation, VariantConfig
from cir.selection import read_scores, select
from cluster.artifacts import Output
from mining import tables
from mining.embed import INFO
from mining.features import Features, FeatureSource, centred

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


def selected_pseudo(pseudo: Output, labelled: pa.Table, config: VariantConfig) -> pa.Table:
    """The pseudo triplets a variant uses, their deltas permuted when the config says so."""
    table = pseudo.read_parts(tables.TRIPLETS)
    scores = read_scores(pseudo, table["triplet_id"].to_numpy()) if config.selection.by_score else None
    table = select(table, scores, len(tables.images_of(labelled)), config.selection)
    if config.shuffle_deltas:
        order = np.random.default_rng(config.selection.seed).permutation(len(table))
        table = table.set_column(table.schema.get_field_index("deltas"), "deltas", table["deltas"].take(pa.array(order)))
    return table


@dataclass
class CirTask:
    """The `cluster.training.Task` of one variant. Holds settings and paths, loads lazily on the worker.

    An epoch is the labelled triplets; with pseudo triplets each labelled row brings one of them, drawn uniformly with
    replacement (PAPER 3.3), so |B| = |B'|. With `pseudo_only` the epoch is the pseudo triplets.
    """

    features: Features
    triplets: Output
    pseudo: Output | None
    config: VariantConfig

    def __post_init__(self) -> None:
        self.best_metric = "val_mrr" if self.config.validation.folds else None

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
        pseudo = selected_pseudo(self.pseudo, self._labelled, self.config)
        return [pseudo] if self.config.pseudo_only else [labelled, pseudo]

    @cached_property
    def _rows(self) -> Rows:
        return Rows.of(pa.concat_tables(self._tables))

    @cached_property
    def _validation(self) -> Rows:
        return Rows.of(self._labelled.filter(pa.array(self._is_held_out)))

    @cached_property
    def _source(self) -> FeatureSource:
        return self.features.open(np.concatenate([self._rows.reference_ids, self._rows.target_ids]))

    @cached_property
    def _encoder(self) -> Any:
        from cir.models.text import load_text_encoder

        return load_text_encoder(self.config.text)

    @cached_property
    def _text_features(self) -> tuple[dict[str, int], Any]:
        """Row of each distinct text, and the frozen encoder's features float32 [texts, width]: computed once."""
        from cir.models.text import encode_texts
        from cluster.devices import device

        texts = sorted({*self._rows.texts.unique().to_pylist(), *self._validation.first()})
        return {text: i for i, text in enumerate(texts)}, encode_texts(self._encoder, texts, device())

    @property
    def size(self) -> int:
        """Rows of an epoch."""
        return len(self._tables[0])

    def check(self) -> tuple[int, int]:
        """Numbers of labelled and of pseudo triplets that are trained on. Raises UserError when an image has no features."""
        images = np.concatenate([self._rows.reference_ids, self._rows.target_ids])
        self.features.check(images, f"train.triplets ({self.triplets.uri}) or the pseudo triplets")
        pseudo = len(self._tables[-1]) if self.pseudo is not None else 0
        return len(self._rows) - pseudo, pseudo

    def build(self) -> Any:
        """The module. A frozen text encoder stays out of it: its outputs are cached here."""
        from cir.models.composed import ComposedRetrieval

        module = ComposedRetrieval(self.config, self.features.embeddings.read_json(INFO)["dim"], self._encoder)
        if not self.config.text.trained:
            module.text = None
        return module

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        """Features [n, dim] of drawn views, and tokens or cached text features; labelled rows first, then pseudo ones."""
        import torch

        supervised = len(rows)
        if len(self._tables) == 2:
            rows = np.concatenate([rows, self.size + rng.integers(len(self._tables[1]), size=supervised)])
        target_ids = self._rows.target_ids[rows]
        return {
            "reference": torch.from_numpy(self._images(self._rows.reference_ids[rows], rng, drawn=True)),
            "target": torch.from_numpy(self._images(target_ids, rng, drawn=self.config.augment_target)),
            "target_id": torch.from_numpy(target_ids),
            "text": self._text(self._rows.draw(rows, rng)),
            "supervised": supervised,
        }

    def _images(self, image_ids: np.ndarray, rng: np.random.Generator, drawn: bool) -> np.ndarray:
        views = self._source.draw_views(len(image_ids), rng) if drawn else np.zeros(len(image_ids), np.int64)
        return self._prepared(self._source.take(image_ids, views))

    def _prepared(self, values: np.ndarray) -> np.ndarray:
        """[n, 1, dim] as the model takes it: [n, dim], centred on the training gallery's mean when the config says so."""
        return centred(values[:, 0], self._source.mean) if self.config.center else values[:, 0]

    def _text(self, texts: list[str]) -> Any:
        if self.config.text.trained:
            return self._encoder.tokenize(texts)
        places, features = self._text_features
        return features[[places[text] for text in texts]]

    @cached_property
    def _gallery(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], prepared plain features [n, dim]) of the images named in the labelled triplets."""
        ids = tables.images_of(self._labelled)
        plain = self.features.open_plain(ids)
        return ids, self._prepared(plain.take(ids, np.zeros(len(ids), np.int64)))

    def validate(self, module: Any) -> dict[str, float]:
        """R@1, R@10 and MRR in percent of the held-out triplets' exact targets among `_gallery`, the reference removed."""
        import torch

        rows = self._validation
        if not len(rows):
            return {}
        ids, values = self._gallery
        place = next(module.parameters()).device
        references, texts = values[np.searchsorted(ids, rows.reference_ids)], rows.first()
        queries = [
            module.compose(
                torch.from_numpy(references[i : i + VALIDATION_BATCH]).to(place),
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
