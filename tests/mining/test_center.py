"""The mean of the labelled triplets' images."""

from pathlib import Path

import numpy as np

from mining.center import Center
from mining.features import read_mean
from tests.cir import world
from tests.stages import given, running


def test_the_mean_is_that_of_the_images_that_triplets_name(tmp_path: Path) -> None:
    embeddings, rows = world.embeddings(tmp_path / "embeddings"), world.triplet_rows(5, 0)
    triplets = world.triplets(tmp_path / "triplets", rows)
    output = world.Output(str(tmp_path / "center"))
    Center(name="photo.labelled", triplets=given(triplets), embeddings=given(embeddings)).work(output, running())
    named = sorted({row[role] for row in rows for role in ("reference_id", "target_id")})
    values = (
        world.features(tmp_path / "embeddings").open_plain(np.array(named)).take(np.array(named), np.zeros(len(named), int))
    )
    np.testing.assert_allclose(read_mean(output), values.mean(axis=(0, 1)), rtol=1e-6)
