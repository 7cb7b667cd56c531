"""What was gained: the metric table with its variants in their roles, and the result in one sentence."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cir.config import VariantConfig
from cir.metrics import Estimate
from cir.rerank import RERANKED
from cluster.app.config import RunConfig
from cluster.app.recommend import Recommendation
from cluster.app.report import words

Role = Literal["baseline", "semi", "labelled", "shuffled", "control", "reference", "reranked"]
HEADLINES = ("mAP@", "R@", "Rs@", "Avg")
BANDS: list[tuple[str, tuple[Role, ...]]] = [
    ("", ("baseline", "labelled", "semi")),
    ("Controls", ("shuffled", "control")),
    ("The best images ordered again by the generator's likelihood", ("reranked",)),
    ("Other labels, for orientation", ("reference",)),
]


@dataclass(frozen=True)
class Value:
    """A metric over the seeds, in percent."""

    mean: float
    seeds: list[float]

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the models; None with a single one."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class Gain(Estimate):
    """Points gained over the baseline."""

    generators: int = 1  # over which it is the mean
    gap: Mapping[str, float] | None = None  # share that it closes of the oracle's gain: mean, low and high

    @property
    def verdict(self) -> Literal["up", "down", "unclear"]:
        """The direction, or unclear while the interval covers 0."""
        return "up" if self.low > 0 else "down" if self.high < 0 else "unclear"


@dataclass(frozen=True)
class Row:
    """One variant; its gain is None where there is no baseline, and for the baseline.

    `pseudo` is the number of generated triplets it was trained on.
    """

    name: str
    role: Role
    note: str
    pseudo: int
    values: dict[str, Value]
    gain: Gain | None


@dataclass(frozen=True)
class Results:
    """The metric table. `metric` is the one that gains are measured in; counts are of triplets.

    `protocol` says how an official benchmark is scored; None for triplets of one's own.
    """

    enough: ClassVar[int] = 3  # generators, to claim a gain: their own spread is as wide as the interval over queries

    metric: str
    rows: list[Row]
    labelled: int
    queries: int
    by_attributes: bool
    protocol: str | None

    @property
    def metrics(self) -> list[str]:
        """Every metric of the evaluation."""
        return list(self.rows[0].values)

    @property
    def recalls(self) -> list[str]:
        """The metrics of the main table: of the benchmark's own protocol, over all queries."""
        return [name for name in self.metrics if name.startswith(HEADLINES) and " " not in name]

    @property
    def models(self) -> int:
        """Models trained of the variant that has most."""
        return max(len(row.values[self.metric].seeds) for row in self.rows)

    @property
    def generators(self) -> int:
        """Generators that were trained."""
        return max((row.gain.generators for row in self.rows if row.gain), default=1)

    @property
    def is_enough(self) -> bool:
        """Whether there are generators enough to claim a gain."""
        return self.generators >= self.enough

    @property
    def baseline(self) -> Row | None:
        """The variant that gains are measured against."""
        return next((row for row in self.rows if row.role == "baseline"), None)

    @property
    def best(self) -> Row | None:
        """The best semi-supervised variant, controls left out."""
        rows = [row for row in self.rows if row.role == "semi"]
        return max(rows, key=self.score, default=None)

    @property
    def bands(self) -> list[tuple[str, list[Row]]]:
        """The rows in bands: the comparison itself, controls, models with other labels."""
        found = [(title, [row for role in roles for row in self.rows if row.role == role]) for title, roles in BANDS]
        return [(title, rows) for title, rows in found if rows]

    def score(self, row: Row) -> float:
        """A row's mean in the metric of the gains."""
        return row.values[self.metric].mean

    @property
    def headline(self) -> str:
        """The result in one sentence; a loss, or a gain whose interval covers 0, is called what it is."""
        best, baseline, metric = self.best, self.baseline, self.metric
        if best is None:
            shown = baseline or self.rows[0]
            return (
                f"The {shown.name} model reaches {metric} {self.score(shown):.1f} with {self.labelled:,} labelled triplets; "
                "no generated ones were used"
            )
        after, generated = self.score(best), f"{self.labelled:,} labelled triplets and {best.pseudo:,} generated ones"
        if baseline is None or best.gain is None:
            return (
                f"The {best.name} model reaches {metric} {after:.1f} with {generated}; there is no supervised model to compare"
            )
        gain, change = best.gain, f"{metric} from {self.score(baseline):.1f} to {after:.1f}"
        span = f"{words.signed(gain.mean)}, 95 % interval {words.interval(gain.low, gain.high)}"
        if gain.verdict == "unclear":
            return f"No clear gain: pseudo triplets move {change} ({span}, which covers 0) with {generated}"
        verb = "raise" if gain.verdict == "up" else "lower"
        return f"Pseudo triplets {verb} {change} ({span}) with {generated}"


def collect_results(
    config: RunConfig,
    metrics: dict[str, Any],
    gains: dict[str, Any],
    rows: Mapping[str, int],
    pseudo: Mapping[str, int],
    protocol: str | None = None,
) -> Results:
    """The metric table from `metrics.json`, `gain.json`, the number of rows of each ingest instance, and the number of
    generated triplets that each variant was trained on.
    """
    baseline = config.evaluate.baseline
    labels = config.train.variant(baseline).triplets if baseline in config.train.variants else config.train.triplets

    def row(name: str, table: dict[str, Any]) -> Row:
        own, gain = name.removesuffix(RERANKED), gains.get(name)
        variant = config.train.variant(own)
        note = words.recipe(variant, rows[f"ingest:{variant.triplets}"], variant.triplets != labels)
        values = {metric: Value(**value) for metric, value in table.items()}
        found = gain and Gain(gain["mean"], gain["low"], gain["high"], gain["generators"], gain["gap"])
        return Row(name, _role(name, variant, baseline, labels), note, pseudo[own], values, found)

    return Results(
        metric=config.evaluate.headline,
        rows=[row(name, table) for name, table in metrics.items()],
        labelled=rows[f"ingest:{labels}"],
        queries=rows["ingest:queries"],
        by_attributes=config.evaluate.attributes is not None,
        protocol=protocol,
    )


def _role(name: str, variant: VariantConfig, baseline: str, labels: str) -> Role:
    if name.endswith(RERANKED):
        return "reranked"
    if name == baseline:
        return "baseline"
    if variant.shuffle_deltas:
        return "shuffled"
    if variant.zero is not None:
        return "control"
    if variant.triplets != labels:
        return "reference"
    return "semi" if variant.pseudo else "labelled"


TRY = (
    "To try: more labelled triplets; a generator trained longer (instruct.training); fewer, surer deltas "
    "(train.selection.top_fraction, or the scorer round_trip); pairs more like the labelled ones (mine.method: matched)"
)


def advice(results: Results, recommended: Recommendation | None) -> str:
    """What to use and to try where pseudo triplets do not help, or not clearly; empty where they do."""
    gain = results.best.gain if results.best else None
    if gain is None or recommended is None:
        return ""
    if not recommended.generated:
        return f"Pseudo triplets do not help here: use {recommended.model}. {TRY}."
    return f"{TRY}." if gain.verdict != "up" else ""
