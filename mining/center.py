"""The stage center: the mean that features are centred by, in mining, in the generator and in retrieval."""

from dataclasses import dataclass, field

import numpy as np

from cluster.artifacts import Output
from cluster.stage import LOOKED_UP, RunContext, Stage
from mining import tables
from mining.embeddings import MEAN
from mining.features import Features

BLOCK = 1024  # images in memory at a time


@dataclass(frozen=True, eq=False, kw_only=True)
class Center(Stage):
    """`center:<tower>.<triplets>`: the mean float32 [dim], over tokens, of the plain images that labelled triplets name.

    Of the labelled images alone, and so one for all variants: photos that come later leave it as it is, and with it every
    model that knows only labels.
    """

    triplets: Stage
    embeddings: Stage = field(metadata=LOOKED_UP)

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when an image has no embeddings."""
        from safetensors.numpy import save

        triplets, features = run.output(self.triplets), Features(run.output(self.embeddings))
        images = tables.images_in(triplets, tables.TRIPLETS)
        features.check(images, triplets.uri)
        source = features.open_plain(images)
        blocks = np.array_split(images, -(-len(images) // BLOCK))
        sums = [source.take(block, np.zeros(len(block), int)).sum(axis=(0, 1), dtype=np.float64) for block in blocks]
        mean = np.sum(sums, axis=0) / (len(images) * source.tokens)
        output.write_bytes(MEAN, save({"mean": mean.astype(np.float32)}))
