"""The stage select, and which pseudo triplets a model is trained on."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cir.config import PseudoSelection, Validation
from cluster.artifacts import Output
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.stage import RunContext, Stage
from mining import tables
from mining.deltas import are_garbled
from mining.gallery import part_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Select(Stage):
    """`select:vdg.r<r>`: the labelled triplets and a round's confident ones, which the next generator learns from."""

    version = 2
    triplets: Stage
    pseudo_triplets: Stage
    scores: Stage | None = None
    selection: PseudoSelection

    def work(self, output: Output, run: RunContext) -> None:
        """One part."""
        known = run.output(self.triplets).read_parts(tables.TRIPLETS)
        table, _ = chosen(pseudo_of(run, self.pseudo_triplets, self.scores), len(tables.images_of(known)), self.selection)
        _write(output, pa.concat_tables([known, table]), run.monitor)


@dataclass(frozen=True, eq=False, kw_only=True)
class SelectOwn(Stage, kind="select"):
    """`select:<triplets>.vdg`: labelled triplets whose lists of deltas also hold what the generator wrote for their pairs.

    One is drawn each time: the augmented training set that the paper marks with a dagger (PAPER 2.3). `alone` leaves the
    people's own deltas out (Table 1 (b)), and with them the pairs that the generator wrote nothing of.
    """

    version = 2
    triplets: Stage
    pseudo_triplets: Stage  # of the same pairs
    alone: bool = False

    def work(self, output: Output, run: RunContext) -> None:
        """One part."""
        written = deltas_of_pairs(run.output(self.pseudo_triplets))
        rows = run.output(self.triplets).read_parts(tables.TRIPLETS).to_pylist()
        for row in rows:
            own = written.get((row["reference_id"], row["target_id"]), [])
            row["deltas"] = own if self.alone else row["deltas"] + own
        _write(output, pa.Table.from_pylist([row for row in rows if row["deltas"]], tables.TRIPLETS), run.monitor)


def deltas_of_pairs(generated: Output) -> dict[tuple[int, int], list[str]]:
    """What a generator wrote of each (reference, target)."""
    table = generated.read_parts(tables.TRIPLETS)
    pairs = zip(table["reference_id"].to_pylist(), table["target_id"].to_pylist(), strict=True)
    return dict(zip(pairs, table["deltas"].to_pylist(), strict=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class SelectFold(Stage, kind="select"):
    """`select:<triplets>.f<fold>`: the labelled triplets without a fold, for a generator that has not seen it."""

    version = 1
    triplets: Stage
    without: Validation

    def work(self, output: Output, run: RunContext) -> None:
        """One part."""
        from cir.tasks.triplets import held_out

        table = run.output(self.triplets).read_parts(tables.TRIPLETS)
        held = held_out(table["triplet_id"].to_numpy(), self.without)
        _write(output, table.filter(pa.array(~held)), run.monitor)


@dataclass(frozen=True)
class Pseudo:
    """Pseudo triplets and what scores them: `generate` keeps its own scores beside them, `score` apart."""

    triplets: Output
    round_trip: Output | None = None

    def scores(self, triplet_ids: np.ndarray, scorers: Sequence[str]) -> np.ndarray:
        """A score float [n] of each triplet, higher is better: a scorer's values, or the mean of several scorers' shares.

        Raises UserError naming a scorer and a triplet without its score.
        """
        found = [self._read(triplet_ids, scorer) for scorer in scorers]
        return found[0] if len(found) == 1 else np.mean([share_beaten(values) for values in found], axis=0)

    def _read(self, triplet_ids: np.ndarray, scorer: str) -> np.ndarray:
        table = SCORERS[scorer].read(self, scorer).sort_by("triplet_id")
        known, values = table["triplet_id"].to_numpy(), table["value"].to_numpy()
        places = np.searchsorted(known, triplet_ids).clip(max=max(len(known) - 1, 0))
        missing = triplet_ids[known[places] != triplet_ids] if len(known) else triplet_ids
        if len(missing):
            raise UserError(
                f"train.selection.scorers: {len(missing)} of {len(triplet_ids)} pseudo triplets in {self.triplets.uri} have no "
                f"{scorer} score, such as {missing[0]}; {SCORERS[scorer].remedy}"
            )
        return values[places]


def pseudo_of(run: RunContext, triplets: Stage, scores: Stage | None) -> Pseudo:
    """What some stages wrote."""
    return Pseudo(run.output(triplets), run.output(scores) if scores else None)


@dataclass(frozen=True)
class Scorer:
    """Where the rows (tables.SCORES) of a scorer's name are, higher is better, and what to do where a triplet has none."""

    read: Callable[[Pseudo, str], pa.Table]
    remedy: str


def written_scores(pseudo_triplets: Output) -> pa.Table:
    """What `generate` knew of its deltas when it wrote them (tables.SCORES)."""
    parts = [pseudo_triplets.read_table(f"scores/{part}", tables.SCORES) for part in pseudo_triplets.names("scores")]
    return pa.concat_tables([tables.SCORES.empty_table(), *parts])


def _written(pseudo: Pseudo, name: str) -> pa.Table:
    table = written_scores(pseudo.triplets)
    return table.filter(pc.equal(table["scorer"], name))


def _judged(pseudo: Pseudo, name: str) -> pa.Table:
    """What the stage `score` found."""
    return pseudo.round_trip.read_parts(tables.SCORES) if pseudo.round_trip else tables.SCORES.empty_table()


# a name of PseudoSelection.scorers -> the scorer
SCORERS = {
    tables.SCORER: Scorer(_written, "generate them again"),
    tables.AGREEMENT: Scorer(_written, "set generate.samples to at least 2"),
    tables.ROUND_TRIP: Scorer(_judged, "run the stage score"),
}


def share_beaten(values: np.ndarray) -> np.ndarray:
    """Share in 0..1 of all values that each is at least as high as, ties sharing their middle: a unit-free score [n]."""
    ordered = np.sort(values)
    low, high = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (low + high) / (2 * max(len(values), 1))


def chosen(pseudo: Pseudo, labelled_images: int, config: PseudoSelection) -> tuple[pa.Table, np.ndarray | None]:
    """The pseudo triplets to train on, and with `weight_power` the probability float [n] of drawing each."""
    table = pseudo.triplets.read_parts(tables.TRIPLETS)
    if config.drop_repeated:
        table = table.filter(pa.array(~repeated(table)))
    if not config.by_score:
        return select(table, None, labelled_images, config), None
    scores = pseudo.scores(table["triplet_id"].to_numpy(), config.scorers)
    kept = select(table, scores, labelled_images, config)
    if config.weight_power is None:
        return kept, None
    by_id = dict(zip(table["triplet_id"].to_pylist(), share_beaten(scores), strict=True))
    weights = np.array([by_id[i] for i in kept["triplet_id"].to_pylist()]) ** config.weight_power
    return kept, weights / weights.sum()


def repeated(pseudo: pa.Table) -> np.ndarray:
    """bool [rows]: whether a delta repeats itself, or is no text."""
    return np.array(are_garbled([deltas[0] for deltas in pseudo["deltas"].to_pylist()]), bool)


def select(pseudo: pa.Table, scores: np.ndarray | None, labelled_images: int, config: PseudoSelection) -> pa.Table:
    """The triplets to train on, in the table's order: those of good score, then an amount drawn in whole groups.

    `scores` [rows] are needed by `min_score` and `top_fraction`; `weight_power` is for `chosen`. A triplet without a group is
    a group of its own.
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
        raise UserError(f"train.selection: none of {found} pseudo triplets is left; loosen its fields")
    return pseudo


def _write(output: Output, table: pa.Table, monitor: Monitor) -> None:
    monitor.start(len(table), "triplet")
    output.write_table(part_name(0), table, tables.TRIPLETS)
    monitor.advance(len(table))


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
