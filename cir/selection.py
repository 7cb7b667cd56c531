"""Which pseudo triplets a model is trained on."""

import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cir.config import PseudoSelection
from cluster.artifacts import Output
from cluster.errors import UserError
from mining import tables

logger = logging.getLogger(__name__)


def read_scores(pseudo: Output, triplet_ids: np.ndarray) -> np.ndarray:
    """Mean token log-probability float32 [n] of each triplet's delta, as `generate` stored it.

    Raises UserError naming a triplet that has no score.
    """
    parts = [pseudo.read_table(f"scores/{name}", tables.SCORES) for name in pseudo.names("scores")]
    table = pa.concat_tables([tables.SCORES.empty_table(), *parts])
    table = table.filter(pc.equal(table["scorer"], tables.SCORER)).sort_by("triplet_id")
    known, values = table["triplet_id"].to_numpy(), table["value"].to_numpy()
    places = np.searchsorted(known, triplet_ids).clip(max=max(len(known) - 1, 0))
    missing = triplet_ids[known[places] != triplet_ids] if len(known) else triplet_ids
    if len(missing):
        raise UserError(
            f"train.selection: {len(missing)} of {len(triplet_ids)} pseudo triplets in {pseudo.uri} have no "
            f"{tables.SCORER} score, such as {missing[0]}; generate them again, or unset min_score and top_fraction"
        )
    return values[places]


def select(pseudo: pa.Table, scores: np.ndarray | None, labelled_images: int, config: PseudoSelection) -> pa.Table:
    """The triplets to train on, in the table's order: those of good score, then an amount drawn in whole groups.

    `scores` [rows] are needed by `min_score` and `top_fraction` alone. A triplet without a group is a group of its own.
    Raises UserError when nothing is left or there are fewer groups than asked for.
    """
    found = len(pseudo)
    if config.by_score:
        assert scores is not None
        pseudo = pseudo.filter(pa.array(_good(scores, config)))
    if config.groups is not None:
        pseudo = pseudo.filter(pa.array(_in_groups(pseudo, config)))
    if config.ratio is not None and len(pseudo):
        pseudo = pseudo.filter(pa.array(_up_to_images(pseudo, math.ceil(config.ratio * labelled_images), config.seed)))
    if not len(pseudo):
        raise UserError(f"train.selection: none of {found} pseudo triplets is left; loosen min_score, top_fraction or ratio")
    return pseudo


def _good(scores: np.ndarray, config: PseudoSelection) -> np.ndarray:
    """bool [n]: at least `min_score`, and of those the best `top_fraction`."""
    good = np.ones(len(scores), bool) if config.min_score is None else scores >= config.min_score
    if config.top_fraction is not None:
        kept = math.ceil(config.top_fraction * good.sum())
        order = np.argsort(-np.where(good, scores, -np.inf), kind="stable")
        good[order[kept:]] = False
    return good


def _in_groups(pseudo: pa.Table, config: PseudoSelection) -> np.ndarray:
    groups = pseudo["group_id"].drop_null().unique().to_numpy()
    wanted = config.groups or 0
    if len(groups) < wanted:
        raise UserError(
            f"train.selection.groups: asked for {wanted}, found {len(groups)} groups among {len(pseudo)} pseudo triplets; "
            "ask for fewer, mine more, or use 'ratio' (which also takes ungrouped triplets)"
        )
    chosen = np.random.default_rng(config.seed).permutation(np.sort(groups))[:wanted]
    return np.isin(pseudo["group_id"].fill_null(-1).to_numpy(), chosen)


def _up_to_images(pseudo: pa.Table, images: int, seed: int) -> np.ndarray:
    """bool [n]: whole groups in random order until they hold at least `images` distinct images."""
    groups, group = np.unique(pc.coalesce(pseudo["group_id"], pseudo["triplet_id"]).to_numpy(), return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(groups))[group]
    ids = np.concatenate([pseudo["reference_id"].to_numpy(), pseudo["target_id"].to_numpy()])
    order = np.argsort(np.tile(place, 2), kind="stable")
    _, first = np.unique(ids[order], return_index=True)
    held = np.cumsum(np.bincount(np.tile(place, 2)[order][first], minlength=len(groups)))
    if held[-1] < images:
        logger.warning("train.selection.ratio asks for %d images, the pseudo triplets have %d: all are taken", images, held[-1])
    return place <= np.searchsorted(held, images)
