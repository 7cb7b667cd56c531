"""The stage evaluate: everything that can be ranked, on one benchmark. The driver stays free of torch."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cir import figures, metrics
from cir.benchmarks import triplets
from cir.benchmarks.benchmark import Benchmark, Figures, Protocol
from cir.benchmarks.official import Annotations
from cir.benchmarks.triplets import check_attributes
from cir.config import EvaluateConfig
from cir.entrants import Entrant, GivenQueries, Trained, controls
from cir.select import deltas_of_pairs
from cir.train import MODEL, RESULT
from cir.vectors import Embedded, Given, Take, Vectors
from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from cluster.stage import RunContext, Source, Stage
from mining.config import TextTower
from mining.embeddings import INFO

CONTROLS = "controls"  # folder of the control rows' rankings
GIVEN = "embeddings"  # name of given embeddings among the variants
SUBMISSIONS = "submissions"
METRICS = "metrics.json"  # of an evaluation, and in the folder of the run that it is the last of
GAIN = "gain.json"
FOLDS = "folds.json"
RANKINGS = pa.schema(
    [
        ("triplet_id", pa.int64()),
        ("image_ids", pa.list_(pa.int64())),  # best first, at least fifty; -1 past the gallery's end
        ("scores", pa.list_(pa.float32())),  # the model's cosines of image_ids; -inf past the gallery's end
        ("correct", pa.list_(pa.bool_())),  # of each of image_ids
        ("target_rank", pa.float32()),  # 1 is best, ties share their mean; null where the target is not known, or not ranked
        ("subset_rank", pa.float32()),  # of the target inside the query's group; null where its members are not known
        ("reference_first", pa.bool_()),  # the reference ranks first, or would have, had it not been removed
    ]
)


@dataclass(frozen=True)
class _Inputs:
    """What each entrant is ranked on; travels to the Ray tasks."""

    output: Output
    benchmark: Benchmark
    vectors: Vectors
    batch_size: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluate(Stage):
    """`evaluate:all`: rankings of the gallery for every query by each model and control row, and the figures.

    A ranking that exists is kept. Written are rankings, `metrics.json`, `gain.json`, `controls.json`, `folds.json`,
    `protocols.json` (what each number is) and, for benchmarks with a server, submission files: these alone where labels are
    hidden.
    """

    version = 8
    queries: Stage
    gallery: Stage
    embeddings: Stage
    models: Mapping[str, Stage]  # by their names: cir.train.ModelName
    folds: Mapping[str, Stage] = field(default_factory=dict)  # "<variant>.f<fold>", cross-validated
    text: TextTower | None  # the encoder of the control rows, where its vectors can be compared with the gallery's
    deltas: Stage | None = None  # the generator's of the queries, in place of the people's
    annotations: Annotations | None = None  # of an official benchmark
    attributes: Source | None = None  # of one's own triplets
    config: EvaluateConfig
    resources: ActorResources

    def config_field(self, name: str) -> str:
        """The text encoder is that of the train section."""
        return "train.text" if name == "text" else super().config_field(name)

    def check(self) -> dict[str, str]:
        """The attributes have to be an object."""
        found = super().check()
        if self.attributes is not None and self.attributes.field not in found:
            try:
                check_attributes(self.attributes.path)
            except UserError as error:
                found[self.attributes.field] = str(error)
        return found

    def benchmark(self, run: RunContext) -> Benchmark:
        """From its own files, or from the ingested triplets."""
        found: Benchmark
        if self.annotations is not None:
            found = self.annotations.load(self.config.remove_reference)
        else:
            attributes = self.attributes.path if self.attributes else None
            found = triplets.load(run.output(self.queries), run.output(self.gallery), attributes, self.config)
        return found.asked(deltas_of_pairs(run.output(self.deltas))) if self.deltas else found

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when an input does not fit."""
        benchmark, embeddings, gallery = self.benchmark(run), run.output(self.embeddings), run.output(self.gallery)
        models = {name: run.output(model) for name, model in self.models.items()}
        Embedded(embeddings).check(benchmark)
        _check_gallery(benchmark, sum(gallery.part_rows().values()))
        _check_models(models, embeddings)
        rows, left_out = controls(self.text)
        trained: dict[str, Entrant] = {name: Trained(model, embeddings, gallery) for name, model in models.items()}
        inputs = _Inputs(output, benchmark, Embedded(embeddings), self.config.batch_size)
        found, extra = _figures(inputs, trained, {} if benchmark.hidden else rows, self.resources, run.monitor)
        output.write_json(METRICS, figures.by_variant(found))
        output.write_json(GAIN, figures.gains(found, self.config, benchmark.classes_of_queries))
        output.write_json(FOLDS, _validated({name: run.output(model) for name, model in self.folds.items()}))
        _write_controls(output, extra, left_out)


def _validated(models: dict[str, Output]) -> dict[str, list[float]]:
    """variant -> the MRR of the held-out triplets, in percent, of every fold."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, model in models.items():
        found[name.partition(".")[0]].append(100 * model.read_json(RESULT)["val_mrr"])
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluateGiven(Stage, kind="evaluate"):
    """As `Evaluate`, of the query and gallery vectors of a file (vectors.Given), without images or a model."""

    version = 6
    queries: Stage
    annotations: Annotations
    embeddings: Source
    config: EvaluateConfig
    resources: ActorResources

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when the vectors do not fit the benchmark."""
        benchmark, vectors = self.annotations.load(self.config.remove_reference), Given(self.embeddings.path)
        vectors.check(benchmark)
        rows, left_out = controls(None, given=True)
        inputs, entrant = _Inputs(output, benchmark, vectors, self.config.batch_size), GivenQueries(vectors)
        found, extra = _figures(inputs, {GIVEN: entrant}, {} if benchmark.hidden else rows, self.resources, run.monitor)
        output.write_json(METRICS, {name: figures.summary([values]) for name, values in found.items()})
        output.write_json(GAIN, {})
        _write_controls(output, extra, left_out)


def _check_gallery(benchmark: Benchmark, images: int) -> None:
    protocol = benchmark.protocols[0]
    if protocol.galleries is None and images - protocol.remove_reference < 2:
        raise UserError(f"evaluate: the gallery has {images} image(s): any model finds the target first; add more images")


def _check_models(models: dict[str, Output], embeddings: Output) -> None:
    info = embeddings.read_json(INFO)
    for name, model in models.items():
        dim = model.read_json(MODEL)["dim"]
        if (info["tokens"], info["dim"]) != (1, dim):
            raise UserError(
                f"evaluate: {name} was trained on one vector of width {dim} an image, the gallery's embeddings have "
                f"{info['tokens']} of width {info['dim']}; embed the gallery with the tower of the model"
            )


def _figures(
    inputs: _Inputs, main: dict[str, Entrant], rows: dict[str, Entrant], resources: ActorResources, monitor: Monitor
) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Metrics of the entrants and of the control rows; none where labels are hidden. Writes `protocols.json`."""
    benchmark, output = inputs.benchmark, inputs.output
    names = {name: name for name in main} | {row: f"{CONTROLS}/{row}" for row in rows}
    entrants = {names[name]: entrant for name, entrant in (main | rows).items()}
    missing = {name: entrant for name, entrant in entrants.items() if not output.exists(ranking(benchmark.protocols[0], name))}
    count = len(benchmark.queries)
    monitor.start(len(entrants) * count, "ranking", (len(entrants) - len(missing)) * count)
    for seconds in _ranked(inputs, missing, resources):
        monitor.advance(count, seconds)
    if benchmark.hidden:
        output.write_json("protocols.json", figures.protocols(benchmark, []))
        return {}, {}
    found = {name: figures_of(benchmark, output, name) for name in entrants}
    output.write_json("protocols.json", figures.protocols(benchmark, list(found.values())))
    by_name = {name: figures.flat(found[names[name]]) for name in names}
    return {name: by_name[name] for name in main}, {name: by_name[name] for name in rows}


def figures_of(benchmark: Benchmark, output: Output, name: str) -> dict[str, Figures]:
    """Label -> metrics of a model, from the rankings in an output."""
    found: dict[str, Figures] = {}
    for protocol in benchmark.protocols:
        found |= benchmark.figures(protocol, output.read_table(ranking(protocol, name), RANKINGS))
    return {label: found[label] for label in benchmark.descriptions()}


def _write_controls(output: Output, rows: dict[str, Figures], left_out: dict[str, str]) -> None:
    table = {name: figures.summary([values]) for name, values in rows.items()}
    output.write_json("controls.json", {"metrics": table, "left_out": left_out})


def ranking(protocol: Protocol, name: str) -> str:
    """The file of a model's ranking."""
    return f"rankings/{f'{protocol.name}/' if protocol.label else ''}{name}.parquet"


def _ranked(inputs: _Inputs, entrants: dict[str, Entrant], resources: ActorResources) -> Iterator[float]:
    """Rank entrants in Ray tasks, `resources.actors` at a time; yields the seconds of each as it is finished."""
    import ray

    task = ray.remote(_rank).options(**resources.ray_options())
    waiting = list(entrants.items())
    running: list[ray.ObjectRef] = []
    shared = ray.put(inputs)
    while waiting or running:
        while waiting and len(running) < resources.actors:
            running.append(task.remote(*waiting.pop(0), shared, resources.cpus))
        (finished, *_), running = ray.wait(running)
        yield ray.get(finished)


def _rank(name: str, entrant: Entrant, inputs: _Inputs, cpus: float) -> float:
    """A Ray task: compose all queries and rank the gallery part by part. The benchmark's own ranking is written last.

    Returns the seconds that it took in a process that has loaded torch.
    """
    from cluster.devices import limit_threads

    limit_threads(cpus)
    began = time.monotonic()
    benchmark = inputs.benchmark
    take = inputs.vectors.open(benchmark.query_images)
    queries, prepare = entrant.compose(benchmark.queries, take, inputs.batch_size)
    searches = [protocol.search(benchmark.queries) for protocol in benchmark.protocols]
    targets = np.zeros_like(queries)
    known = np.flatnonzero(searches[0].target_ids != metrics.NO_IMAGE)
    if len(known):
        targets[known] = prepare(take(searches[0].target_ids[known]))
    blocks = ((ids, prepare(values)) for ids, values in inputs.vectors.blocks())
    ranked = metrics.rank_all(queries, blocks, searches, targets, benchmark.top)
    groups = _groups(benchmark, queries, lambda ids: prepare(take(ids)))
    for protocol, found in reversed(list(zip(benchmark.protocols, ranked, strict=True))):
        if not name.startswith(f"{CONTROLS}/"):
            best = [group.image_ids if group else np.empty(0, np.int64) for group in groups]
            _write_submissions(inputs, name, benchmark.submissions(protocol, found.image_ids, best))
        inputs.output.write_table(ranking(protocol, name), _table(benchmark, found, groups), RANKINGS)
    return time.monotonic() - began


def _groups(benchmark: Benchmark, queries: np.ndarray, features_of: Take) -> list[metrics.RankedGroup | None]:
    """Each query's group; None where the members are not known."""
    grouped = [i for i, query in enumerate(benchmark.queries) if query.members]
    if not grouped:
        return [None] * len(queries)
    members = [np.array(benchmark.queries[i].members, np.int64) for i in grouped]
    references = np.array([benchmark.queries[i].reference for i in grouped])
    ranked = metrics.rank_groups(queries[grouped], members, features_of(np.concatenate(members)), references)
    found = dict(zip(grouped, ranked, strict=True))
    return [found.get(i) for i in range(len(queries))]


def _table(benchmark: Benchmark, ranked: metrics.Ranked, groups: list[metrics.RankedGroup | None]) -> pa.Table:
    pairs = zip(benchmark.queries, groups, strict=True)
    subset = [group.rank_of(query.targets[0]) if query.targets and group else None for query, group in pairs]
    columns = {
        "triplet_id": [query.query_id for query in benchmark.queries],
        "image_ids": list(ranked.image_ids),
        "scores": list(ranked.scores),
        "correct": list(benchmark.correct(ranked.image_ids)),
        "target_rank": pa.array(ranked.target_rank, mask=ranked.target_rank == metrics.UNRANKED),
        "subset_rank": subset,
        "reference_first": ranked.reference_first,
    }
    return pa.table(columns, schema=RANKINGS)


def _write_submissions(inputs: _Inputs, name: str, files: dict[str, dict[str, object]]) -> None:
    for file, content in files.items():
        text = json.dumps(content, separators=(",", ":"))  # the servers take 5 MB
        inputs.output.write_bytes(f"{SUBMISSIONS}/{name}/{file}", text.encode())
