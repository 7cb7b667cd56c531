"""How right the deltas are, where the attributes of the mined photos are known.

They serve this alone: nothing that is trained or selected sees them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from cir.benchmarks.triplets import check_attributes
from cir.select import chosen, pseudo_of, repeated
from cir.train import Train
from cluster.app.graph import Graph
from cluster.monitor import Monitor
from cluster.stage import RunContext
from mining import tables
from mining.gallery import keys

ALL = "all that were generated"
ONCE = "without those that repeat themselves"


@dataclass(frozen=True)
class DeltaPrecision:
    """The deltas of a generator that a filter leaves, of photos of known attributes.

    `share` is the percentage whose words fit the target and not only the reference.
    """

    generator: str
    filter: str
    rows: int
    share: float


def collect_precision(graph: Graph) -> list[DeltaPrecision]:
    """Of each generator all deltas, those that are no repeats, and what each variant selects; none without attributes."""
    path, run = graph.config.report.attributes, RunContext(graph.root, Monitor())
    if path is None:
        return []
    content, ids = check_attributes(path, "report.attributes"), keys(run.output(graph[f"ingest:{graph.config.mine.gallery}"]))
    judge = Judge({ids[key]: {name: str(v) for name, v in values.items()} for key, values in content.items() if key in ids})
    found: dict[tuple[str, str], DeltaPrecision] = {}
    for model in graph.models.values():
        assert isinstance(model, Train)
        if model.pseudo_triplets is None or model.config.shuffle_deltas:
            continue
        generator, variant = model.pseudo_triplets.instance, model.variant
        pseudo = pseudo_of(run, model.pseudo_triplets, model.scores)
        if (generator, ALL) not in found:
            table = pseudo.triplets.read_parts(tables.TRIPLETS)
            found[generator, ALL] = judge.precision(generator, ALL, table)
            found[generator, ONCE] = judge.precision(generator, ONCE, table.filter(pa.array(~repeated(table))))
        if (generator, variant) not in found:
            images = tables.images_in(run.output(model.triplets), tables.TRIPLETS)
            used = chosen(pseudo, len(images), model.config.selection)[0]
            found[generator, variant] = judge.precision(generator, variant, used)
    return list(found.values())


class Judge:
    """Tells whether a delta's words fit, by the attributes (name to value) of the images."""

    def __init__(self, attributes: Mapping[int, Mapping[str, str]]) -> None:
        self.attributes = attributes
        values = {value for image in attributes.values() for value in image.values()}
        self.words = {value: words for value in values if (words := _words(value))}

    def precision(self, generator: str, name: str, table: pa.Table) -> DeltaPrecision:
        """Of some pseudo triplets."""
        rows, known = table.select(["reference_id", "target_id", "deltas"]).to_pylist(), self.attributes
        pairs = [(row["deltas"][0], known.get(row["reference_id"]), known.get(row["target_id"])) for row in rows]
        fit = [self.fits(delta, before, after) for delta, before, after in pairs if before is not None and after is not None]
        return DeltaPrecision(generator, name, len(fit), 100 * sum(fit) / max(len(fit), 1))

    def fits(self, delta: str, reference: Mapping[str, str], target: Mapping[str, str]) -> bool:
        """Whether a delta names a value of the target that the reference does not have."""
        said = self.said(delta)
        return any(value in said and reference.get(name) != value for name, value in target.items())

    def said(self, delta: str) -> set[str]:
        """Values all of whose words a delta has; of one inside another the longer: "light blue" does not say "blue"."""
        words = _words(delta)
        named = {value: own for value, own in self.words.items() if own <= words}
        return {value for value, own in named.items() if not any(own < other for other in named.values())}


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
