"""What the report shows, collected from a run's outputs: tables column-wise and in samples, images by id."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from cir.evaluate import METRICS
from cir.index import data_uri, thumbnail
from cir.train import MODEL, ModelName
from cluster.app.config import PRESETS, RunConfig, load
from cluster.app.graph import Graph
from cluster.app.recommend import Recommendation, recommend
from cluster.app.report.examples import Generated, Mined, Retrieval, collect_generated, collect_mined, collect_retrieval
from cluster.app.report.precision import Precision, collect_precision
from cluster.app.report.results import Results, advice, collect_results, headline
from cluster.artifacts import MANIFEST, Output, below, filesystem
from cluster.redaction import hidden, without_user
from cluster.stage import Stage
from cluster.training import loop
from mining.gallery import read_images

THUMBNAIL = 144  # pixels of the longer side


@dataclass(frozen=True)
class Curve:
    """One series of a training stage, the mean over its models."""

    name: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Curves:
    """Training losses, and validation metrics where triplets were held out: metric -> a curve a variant."""

    align: Curve | None
    instruct: Curve | None
    retrieval: list[Curve]
    validation: dict[str, list[Curve]]


@dataclass(frozen=True)
class Record:
    """What a stage instance's manifest says."""

    instance: str
    digest: str
    rows: int
    rejects: dict[str, int]
    seconds: float
    startup_seconds: float
    warnings: list[str]


@dataclass(frozen=True)
class Report:
    """Everything on the page. `images` maps an image id to a JPEG data URI."""

    name: str
    date: datetime
    results: Results
    mined: Mined | None
    generated: Generated | None
    retrieval: Retrieval | None
    curves: Curves
    records: list[Record]
    command: str
    config: str
    images: dict[int, str]
    recommendation: Recommendation | None
    precision: list[Precision]

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        return headline(self.results)

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """(instance, what its stage found odd)."""
        return [(record.instance, said) for record in self.records for said in record.warnings]

    @property
    def advice(self) -> str:
        """What to use and to try where pseudo triplets do not help; empty where they do."""
        return advice(self.results, self.recommendation)

    @property
    def seconds(self) -> float:
        """Time of all stages together."""
        return sum(record.seconds for record in self.records)

    @property
    def startup_seconds(self) -> float:
        """Of these the time before a first part or step was done."""
        return sum(record.startup_seconds for record in self.records)


def _record(manifest: Mapping[str, Any]) -> Record:
    """Not every manifest has warnings, and an older version's does not tell its start-up."""
    known = {"startup_seconds": 0.0, "warnings": [], **manifest}
    return Record(**{name: known[name] for name in Record.__dataclass_fields__})


class _Run:
    """A graph whose stages are finished."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.config = graph, graph.config
        self.stages = {stage.instance: stage for stage in graph.stages}
        self.manifests: dict[str, Mapping[str, Any]] = {
            instance: graph.output(stage).manifest() or {} for instance, stage in self.stages.items()
        }

    def find(self, kind: str) -> Stage | None:
        """The first round's instance of a kind, or None where the run has none."""
        name = self.config.mine.gallery if kind in ("mine", "generate") else "vdg"
        return self.stages.get(f"{kind}:{name}")

    def output(self, instance: str) -> Output:
        """The output of an instance."""
        return self.graph.output(self.stages[instance])


def collect(graph: Graph) -> Report:
    """Everything that the page shows. Reads the images shown and no others."""
    run = _Run(graph)
    results = _results(run)
    mined, generated, retrieval = _mined(run), _generated(run, results), _retrieval(run, results)
    shown = [image for section in (mined, generated, retrieval) if section for image in section.image_ids()]
    return Report(
        name=run.config.name,
        date=_finished(graph.output(graph.evaluation)),
        results=results,
        mined=mined,
        generated=generated,
        retrieval=retrieval,
        curves=_curves(run),
        records=[_record(manifest) for manifest in run.manifests.values()],
        command=_command(run.config),
        config=yaml.safe_dump(hidden(run.config.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
        images=_thumbnails(run, shown),
        recommendation=recommend(graph),
        precision=collect_precision(graph),
    )


def _results(run: _Run) -> Results:
    evaluation = run.output("evaluate:all")
    rows = {instance: manifest["rows"] for instance, manifest in run.manifests.items()}
    seed = run.config.train.seeds[0]
    models = {name: run.output(f"train:{name}.s{seed}").read_json(MODEL) for name in run.config.train.variants}
    pseudo = {name: model["pseudo_triplets"] for name, model in models.items()}
    official = run.config.evaluate.is_official
    protocol = evaluation.read_json("protocols.json")[0]["description"] if official else None
    metrics, gains = evaluation.read_json(METRICS), evaluation.read_json("gain.json")
    return collect_results(run.config, metrics, gains, rows, pseudo, protocol)


def _rng(run: _Run, section: int) -> np.random.Generator:
    return np.random.default_rng([run.config.report.seed, section])


def _mined(run: _Run) -> Mined | None:
    if (stage := run.find("mine")) is None:
        return None
    total, at_random = run.manifests[stage.instance]["rows"], run.config.mine.method == "random"
    return collect_mined(run.graph.output(stage), total, at_random, run.config.report.examples, _rng(run, 0))


def _generated(run: _Run, results: Results) -> Generated | None:
    if (stage := run.find("generate")) is None:
        return None
    train = run.config.train
    selection = train.variant(results.best.name).selection if results.best else train.selection
    return collect_generated(
        run.graph.output(stage),
        run.output(f"ingest:{run.config.instruct.triplets}"),
        run.manifests[stage.instance],
        selection,
        run.config.report.examples,
        _rng(run, 1),
    )


def _retrieval(run: _Run, results: Results) -> Retrieval | None:
    """With the first seed's models."""
    before, after = results.baseline, results.best
    if before is None or after is None:
        return None
    seed, count = run.config.train.seeds[0], run.config.report.examples
    models = before.name, after.name
    return collect_retrieval(run.output("evaluate:all"), run.output("ingest:queries"), models, seed, count, _rng(run, 2))


def _thumbnails(run: _Run, image_ids: list[int]) -> dict[int, str]:
    """JPEG data URIs of some images of the mined gallery and of the evaluated one."""
    names = {f"ingest:{run.config.mine.gallery}", "ingest:evaluate"} & set(run.stages)
    found = read_images([run.output(name) for name in sorted(names)], image_ids) if image_ids else {}
    return {image: data_uri(thumbnail(content, THUMBNAIL)) for image, content in found.items()}


def _curves(run: _Run) -> Curves:
    logs = {i: _log(run.output(i)) for i in run.stages if run.output(i).exists(loop.METRICS)}
    variants: dict[str, list[dict[int, dict[str, float]]]] = defaultdict(list)
    for name, model in run.graph.models.items():
        variants[ModelName.parse(name).variant].append(logs[model.instance])
    names = dict.fromkeys(n for log in logs.values() for point in log.values() for n in point if n.startswith("val_"))
    alone = {kind: _curve(kind, [logs[s.instance]], "loss") for kind in ("align", "instruct") if (s := run.find(kind))}
    validation = {name: [_curve(v, found, name) for v, found in variants.items()] for name in names}
    return Curves(
        align=alone.get("align"),
        instruct=alone.get("instruct"),
        retrieval=[_curve(variant, found, "loss") for variant, found in variants.items()],
        validation={name: [curve for curve in curves if len(curve.steps)] for name, curves in validation.items()},
    )


def _log(output: Output) -> dict[int, dict[str, float]]:
    """Step -> metrics; of steps done again after a kill the later ones."""
    return {int(report["step"]): report for report in loop.reports_of(output)}


def _curve(name: str, logs: list[dict[int, dict[str, float]]], metric: str) -> Curve:
    """Mean over the models at the steps that all of them report."""
    steps = sorted(set.intersection(*({step for step, point in log.items() if metric in point} for log in logs)))
    return Curve(name, np.array(steps), np.array([np.mean([log[step][metric] for log in logs]) for step in steps]))


def _finished(evaluation: Output) -> datetime:
    """When the run's last stage was finished, in UTC."""
    system, _ = filesystem(evaluation.uri)
    return system.get_file_info(evaluation.path(MANIFEST)).mtime or datetime.now(UTC)


def _command(config: RunConfig) -> str:
    """What repeats the run: the preset's name where it is the preset as it stands, else the config kept with the report."""
    if (PRESETS / f"{config.name}.yaml").exists() and load(config.name, []) == config:
        return config.name
    return without_user(below(config.root, f"runs/{config.name}/config.yaml"))
