"""What the report shows, collected from a run's outputs: tables column-wise and in samples, images by id."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml

from cir.evaluate import GAIN, METRICS
from cir.index import data_uri, thumbnail
from cir.train import MODEL, ModelName
from cluster.app.config import PRESETS, RunConfig, load
from cluster.app.graph import Graph
from cluster.app.recommend import Recommendation, recommend
from cluster.app.report import examples
from cluster.app.report.examples import FinishedRun
from cluster.app.report.precision import DeltaPrecision, collect_precision
from cluster.app.report.results import Results, advice, collect_results
from cluster.artifacts import MANIFEST, Output, below
from cluster.redaction import hidden, without_user
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
class Report:
    """Everything on the page. `images` maps an image id to a JPEG data URI."""

    name: str
    date: datetime  # when the run's last stage was finished, in UTC
    results: Results
    mined: examples.Mined | None
    generated: examples.Generated | None
    retrieval: examples.Comparison | None
    curves: Curves
    manifests: list[Mapping[str, Any]]  # of every stage instance
    command: str
    config: str
    images: dict[int, str]
    recommendation: Recommendation | None
    advice: str
    precision: list[DeltaPrecision]


def collect(graph: Graph) -> Report:
    """Everything that the page shows. Reads the images shown and no others."""
    run = FinishedRun(graph)
    results = _results(run)
    mined, generated = examples.collect_mined(run), examples.collect_generated(run, results)
    retrieval = examples.collect_retrieval(run, results)
    recommended, evaluation = recommend(graph), graph.output(graph.evaluation)
    system, _ = evaluation.location
    shown = [image for section in (mined, generated, retrieval) if section for image in section.image_ids()]
    galleries = {f"ingest:{run.config.mine.gallery}", "ingest:evaluate"} & set(run.stages)
    images = read_images([run.output(name) for name in sorted(galleries)], shown) if shown else {}
    return Report(
        name=run.config.name,
        date=system.get_file_info(evaluation.path(MANIFEST)).mtime or datetime.now(UTC),
        results=results,
        mined=mined,
        generated=generated,
        retrieval=retrieval,
        curves=_curves(run),
        manifests=list(run.manifests.values()),
        command=_command(run.config),
        config=yaml.safe_dump(hidden(run.config.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
        images={image: data_uri(thumbnail(content, THUMBNAIL)) for image, content in images.items()},
        recommendation=recommended,
        advice=advice(results, recommended),
        precision=collect_precision(graph),
    )


def _results(run: FinishedRun) -> Results:
    evaluation = run.output("evaluate:all")
    rows = {instance: manifest["rows"] for instance, manifest in run.manifests.items()}
    seed = run.config.train.seeds[0]
    models = {name: run.output(f"train:{name}.s{seed}").read_json(MODEL) for name in run.config.train.variants}
    pseudo = {name: model["pseudo_triplets"] for name, model in models.items()}
    official = run.config.evaluate.is_official
    protocol = evaluation.read_json("protocols.json")[0]["description"] if official else None
    results = run.graph.output(run.graph.results)
    metrics, gains = results.read_json(METRICS), results.read_json(GAIN)
    return collect_results(run.config, metrics, gains, rows, pseudo, protocol)


def _curves(run: FinishedRun) -> Curves:
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


def _command(config: RunConfig) -> str:
    """What repeats the run: the preset's name where it is the preset as it stands, else the config kept with the report."""
    if (PRESETS / f"{config.name}.yaml").exists() and load(config.name, []) == config:
        return config.name
    return without_user(below(config.root, f"runs/{config.name}/config.yaml"))
