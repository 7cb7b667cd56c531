"""The examples of a run: mined pairs, generated deltas, and retrieval before and after. All drawn by seed."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cir.evaluate import RANKINGS
from cir.select import repeated
from cluster.app.graph import Graph
from cluster.app.report.results import Results
from cluster.artifacts import Output
from cluster.stage import Stage
from mining import tables
from mining.pairs.similarities import SIMILARITIES
from mining.pairs.walk import GROUP_SIZE

SAMPLE_ROWS = 20_000  # of a large table: whole parts, drawn by seed
TOP = 5
OFTEN = 6


class FinishedRun:
    """A graph whose stages are finished."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.config = graph, graph.config
        self.stages = {stage.instance: stage for stage in graph.stages}
        # not every manifest has warnings, or an older one its start-up
        unsaid: dict[str, Any] = {"startup_seconds": 0.0, "warnings": []}
        self.manifests: dict[str, Mapping[str, Any]] = {
            instance: unsaid | dict(graph.output(stage).manifest() or {}) for instance, stage in self.stages.items()
        }

    def find(self, kind: str) -> Stage | None:
        """The first round's instance of a kind, or None where the run has none."""
        name = self.config.mine.gallery if kind in ("mine", "generate") else "vdg"
        return self.stages.get(f"{kind}:{name}")

    def output(self, instance: str) -> Output:
        """The output of an instance."""
        return self.graph.output(self.stages[instance])

    def rng(self, section: int) -> np.random.Generator:
        """What draws a section's examples."""
        return np.random.default_rng([self.config.report.seed, section])


def sample(output: Output, read: Callable[[str], pa.Table], rng: np.random.Generator) -> pa.Table:
    """Whole parts of a table in random order, until there are `SAMPLE_ROWS` rows; `read` reads one part."""
    parts = output.parts()
    chosen, rows = [read(parts[0]).slice(0, 0)], 0
    for i in rng.permutation(len(parts)).tolist():
        chosen.append(read(parts[i]))
        rows += len(chosen[-1])
        if rows >= SAMPLE_ROWS:
            break
    return pa.concat_tables(chosen)


def draw(rng: np.random.Generator, rows: np.ndarray, count: int) -> list[int]:
    """At most `count` of some rows, each once, in a random order."""
    return rng.permutation(rows)[:count].tolist()


@dataclass(frozen=True)
class Member:
    """An image of a mined group, or the target of a mined pair, with its similarity to the first one."""

    image_id: int
    similarity: float | None


@dataclass(frozen=True)
class Mined:
    """Groups (six images each) or pairs (two), and densities of similarity: "edges", "gallery", "labelled", "mined"."""

    total: int
    grouped: bool
    at_random: bool
    strips: list[list[Member]]
    similarities: dict[str, list[float]]

    def image_ids(self) -> Iterator[int]:
        """Images shown."""
        return (member.image_id for strip in self.strips for member in strip)


def collect_mined(run: FinishedRun) -> Mined | None:
    """Strips drawn from a mine output: as many pairs as the config says, or half as many groups."""
    if (stage := run.find("mine")) is None:
        return None
    pairs, count, rng = run.output(stage.instance), run.config.report.examples, run.rng(0)
    columns = ["group_id", "reference_id", "target_id", "reference_rank", "target_rank", "similarity"]
    table = sample(pairs, lambda part: pairs.read_table(part, tables.PAIRS, columns), rng)
    grouped = table["group_id"].null_count < len(table)
    strips = _groups(table, (count + 1) // 2, rng) if grouped else _pairs(table, count, rng)
    at_random = run.config.mine.method == "random"
    return Mined(run.manifests[stage.instance]["rows"], grouped, at_random, strips, pairs.read_json(SIMILARITIES))


def _pairs(table: pa.Table, count: int, rng: np.random.Generator) -> list[list[Member]]:
    chosen = table.take(draw(rng, np.arange(len(table)), count)).sort_by([("similarity", "descending")])
    return [[Member(r["reference_id"], None), Member(r["target_id"], r["similarity"])] for r in chosen.to_pylist()]


def _groups(table: pa.Table, count: int, rng: np.random.Generator) -> list[list[Member]]:
    """Groups all of whose images are in the sample, each in order of rank."""
    strips: list[list[Member]] = []
    for group in draw(rng, table["group_id"].drop_null().unique().to_numpy(), len(table)):
        rows = table.filter(pc.equal(table["group_id"], group)).to_pylist()
        images = {row[f"{role}_rank"]: row[f"{role}_id"] for row in rows for role in ("reference", "target")}
        if len(images) == GROUP_SIZE:
            to_anchor = {
                max(r["reference_rank"], r["target_rank"]): r["similarity"]
                for r in rows
                if 0 in (r["reference_rank"], r["target_rank"])
            }
            strips.append([Member(images[rank], to_anchor.get(rank)) for rank in sorted(images)])
        if len(strips) == count:
            break
    return strips


@dataclass(frozen=True)
class PseudoTriplet:
    """A generated triplet; `score` is the mean log-probability of the delta's tokens."""

    reference_id: int
    target_id: int
    delta: str
    score: float

    @property
    def probability(self) -> float:
        """Geometric mean of the tokens' probabilities, in percent."""
        return 100 * float(np.exp(self.score))


@dataclass(frozen=True)
class Texts:
    """Some deltas: their lengths in words, how many differ, and the most frequent ones with their counts."""

    lengths: np.ndarray
    distinct: int
    often: list[tuple[str, int]]

    @classmethod
    def of(cls, texts: list[str]) -> "Texts":
        """Of a list of deltas."""
        counts = Counter(texts)
        return cls(np.array([len(text.split()) for text in texts], np.int64), len(counts), counts.most_common(OFTEN))

    @property
    def repeated(self) -> float:
        """Share that repeats another delta word for word, in percent."""
        return 100 * (1 - self.distinct / max(len(self.lengths), 1))


@dataclass(frozen=True)
class Generated:
    """Pseudo triplets: a random draw, and draws from the most and the least confident tenth.

    Those that repeat themselves are counted as `dropped`, and not shown, where the selection leaves them out.
    """

    total: int
    rejected: int
    dropped: int
    random: list[PseudoTriplet]
    confident: list[PseudoTriplet]
    unsure: list[PseudoTriplet]
    texts: Texts
    human: Texts
    scores: np.ndarray
    least_score: float | None

    def image_ids(self) -> Iterator[int]:
        """Images shown."""
        shown = (*self.random, *self.confident, *self.unsure)
        return (image for one in shown for image in (one.reference_id, one.target_id))


def collect_generated(run: FinishedRun, results: Results) -> Generated | None:
    """Examples and statistics of a generate output, beside the human deltas that the generator learned from."""
    if (stage := run.find("generate")) is None:
        return None
    train, count, rng = run.config.train, run.config.report.examples, run.rng(1)
    selection = train.variant(results.best.name).selection if results.best else train.selection
    pseudo, human = run.output(stage.instance), run.output(f"ingest:{run.config.instruct.triplets}")
    manifest = run.manifests[stage.instance]
    drawn = sample(pseudo, lambda part: _with_scores(pseudo, part), rng)
    table = drawn.filter(pa.array(~repeated(drawn))) if selection.drop_repeated else drawn
    top_fraction, alone = selection.top_fraction, selection.scorers == (tables.SCORER,)
    labelled = sample(human, lambda part: human.read_table(part, tables.TRIPLETS, ["deltas"]), rng)
    scores = table["score"].to_numpy()
    order, tenth = np.argsort(scores, kind="stable"), max(len(scores) // 10, min(count, len(scores)))
    return Generated(
        total=manifest["rows"],
        rejected=sum(manifest["rejects"].values()),
        dropped=len(drawn) - len(table),
        random=_examples(table, draw(rng, np.arange(len(table)), count)),
        confident=_examples(table, draw(rng, order[len(order) - tenth :], (count + 1) // 2)),
        unsure=_examples(table, draw(rng, order[:tenth], (count + 1) // 2)),
        texts=Texts.of(_flat(table)),
        human=Texts.of(_flat(labelled)),
        scores=scores,
        least_score=float(np.quantile(scores, 1 - top_fraction)) if top_fraction and alone and len(scores) else None,
    )


def _with_scores(pseudo: Output, part: str) -> pa.Table:
    triplets = pseudo.read_table(part, tables.TRIPLETS, ["triplet_id", "reference_id", "target_id", "deltas"])
    scores = pseudo.read_table(f"scores/{part}", tables.SCORES)
    scores = scores.filter(pc.equal(scores["scorer"], tables.SCORER))
    value = dict(zip(scores["triplet_id"].to_pylist(), scores["value"].to_pylist(), strict=True))
    return triplets.append_column("score", pa.array([value[i] for i in triplets["triplet_id"].to_pylist()], pa.float32()))


def _flat(table: pa.Table) -> list[str]:
    return [text for texts in table["deltas"].to_pylist() for text in texts]


def _examples(table: pa.Table, rows: list[int]) -> list[PseudoTriplet]:
    chosen = table.take(pa.array(rows, pa.int64())).to_pylist()
    return [PseudoTriplet(row["reference_id"], row["target_id"], row["deltas"][0], row["score"]) for row in chosen]


Outcome = Literal["gained", "lost", "both"]


@dataclass(frozen=True)
class Retrieved:
    """A retrieved image, and whether it is right."""

    image_id: int
    right: bool


@dataclass(frozen=True)
class Case:
    """A query and the best images of both models."""

    outcome: Outcome
    reference_id: int
    text: str
    before: list[Retrieved]
    after: list[Retrieved]


@dataclass(frozen=True)
class Comparison:
    """Queries before and after, by who has a right image first. `counts` is over all queries, "neither" included."""

    before: str
    after: str
    seed: int
    counts: dict[str, int]
    cases: list[Case]

    def image_ids(self) -> Iterator[int]:
        """Images shown."""
        for case in self.cases:
            yield case.reference_id
            yield from (hit.image_id for hit in (*case.before, *case.after))


def collect_retrieval(run: FinishedRun, results: Results) -> Comparison | None:
    """By the first seed's models: half of the cases gained, a quarter lost, a quarter right in both, of all such queries."""
    if results.baseline is None or results.best is None:
        return None
    seed, count, rng = run.config.train.seeds[0], run.config.report.examples, run.rng(2)
    models, evaluation = (results.baseline.name, results.best.name), run.output("evaluate:all")
    names = [f"rankings/{model}.s{seed}.parquet" for model in models]
    before, after = (_first_right(evaluation, name) for name in names)
    rows = {"gained": ~before & after, "lost": before & ~after, "both": before & after, "neither": ~before & ~after}
    shares: dict[Outcome, int] = {"gained": (count + 1) // 2, "lost": (count + 3) // 4, "both": count // 4}
    drawn = [(outcome, row) for outcome, n in shares.items() for row in draw(rng, np.flatnonzero(rows[outcome]), n)]
    places = pa.array([row for _, row in drawn], pa.int64())
    rankings = [
        evaluation.read_table(name, RANKINGS, ["triplet_id", "image_ids", "correct"]).take(places).to_pylist() for name in names
    ]
    asked = _asked(run.output("ingest:queries"), [ranking["triplet_id"] for ranking in rankings[0]])
    cases = [
        Case(outcome, *asked[first["triplet_id"]], _hits(first), _hits(second))
        for (outcome, _), first, second in zip(drawn, *rankings, strict=True)
    ]
    return Comparison(*models, seed, {name: int(chosen.sum()) for name, chosen in rows.items()}, cases)


def _first_right(evaluation: Output, name: str) -> np.ndarray:
    """bool [queries]."""
    correct = evaluation.read_table(name, RANKINGS, ["correct"])["correct"]
    return np.asarray(pc.list_element(correct, 0).to_numpy(), bool)


def _asked(queries: Output, triplet_ids: list[int]) -> dict[int, tuple[int, str]]:
    """Reference and text of some queries, by triplet id."""
    table = queries.read_parts(tables.TRIPLETS, ["triplet_id", "reference_id", "deltas"])
    rows = table.filter(pc.is_in(table["triplet_id"], pa.array(triplet_ids, pa.int64()))).to_pylist()
    return {row["triplet_id"]: (row["reference_id"], row["deltas"][0]) for row in rows}


def _hits(ranking: dict[str, Any]) -> list[Retrieved]:
    pairs = zip(ranking["image_ids"][:TOP], ranking["correct"][:TOP], strict=True)
    return [Retrieved(image, right) for image, right in pairs if image >= 0]
