"""The evaluate stage: every trained model on one gallery and query file. The driver stays free of torch."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cir import metrics
from cir.compose import compose_queries, target_side
from cir.config import EvaluateConfig
from cir.data import Rows
from cir.train import MODEL
from cluster.artifacts import Output
from cluster.config import ActorResources
from cluster.errors import UserError
from cluster.monitor import Monitor
from mining import tables
from mining.embed import INFO, plain_parts, read_part
from mining.features import Features
from mining.gallery import GROUPS, keys
from mining.sources import read_json

EVALUATE_VERSION = 2
RANKINGS = pa.schema(
    [
        ("triplet_id", pa.int64()),
        ("image_ids", pa.list_(pa.int64())),  # best first, at least ten, the reference removed; -1 past the gallery's end
        ("correct", pa.list_(pa.bool_())),  # of each of image_ids: the target itself, or the same attributes
        ("target_rank", pa.int32()),  # 1 is best
        ("subset_rank", pa.int32()),  # of the target inside the query's group; null where its members are not known
        ("reference_first", pa.bool_()),  # the reference would have ranked first
    ]
)


@dataclass(frozen=True)
class _Inputs:
    """What each model is scored on; travels to the Ray tasks."""

    output: Output
    embeddings: Output
    queries: Output
    gallery: Output
    groups: dict[int, np.ndarray]  # ids of every image of a group
    classes: dict[int, int] | None
    config: EvaluateConfig


def evaluate(
    output: Output,
    embeddings: Output,
    queries: Output,
    gallery: Output,
    attributes: str | None,
    models: dict[str, Output],
    config: EvaluateConfig,
    resources: ActorResources,
    monitor: Monitor,
) -> None:
    """Rank the gallery for every query with each model ("<variant>.s<seed>"), and write metrics, gains and rankings.

    A ranking that exists is kept. R@K counts an image as right when its attributes equal the target's, where
    `attributes` (JSON: key -> dict) are given; else the target alone. Rs@K is reported where the queries list the members
    of their groups: a group known through its triplets alone would be too easy. Raises UserError when an input does not fit.
    """
    table, groups = queries.read_parts(tables.TRIPLETS), _groups(queries)
    if not len(table):
        raise UserError(f"evaluate.triplets: {queries.uri} has no triplets")
    Features(embeddings).check(_images_of(table, groups), "evaluate.triplets")
    _check_models(models, embeddings)
    classes = _attribute_classes(attributes, gallery, table) if attributes else None
    inputs = _Inputs(output, embeddings, queries, gallery, groups, classes, config)
    missing = {name: model for name, model in models.items() if not output.exists(_ranking(name))}
    monitor.start(len(models) * len(table), "ranking", (len(models) - len(missing)) * len(table))
    for _ in _ranked(inputs, missing, resources):
        monitor.advance(len(table))
    hits = {
        name: _metrics_of(output.read_table(_ranking(name), RANKINGS), config, exact=classes is not None) for name in models
    }
    output.write_json("metrics.json", _by_variant(hits))
    output.write_json("gain.json", _gains(hits, config))


def _ranking(name: str) -> str:
    return f"rankings/{name}.parquet"


def _groups(queries: Output) -> dict[int, np.ndarray]:
    """Ids of every image of each group whose members the queries list."""
    if not queries.exists(GROUPS):
        return {}
    table = queries.read_table(GROUPS, tables.GROUPS)
    return dict(zip(table["group_id"].to_pylist(), table["image_ids"].to_numpy(), strict=True))


def _images_of(table: pa.Table, groups: dict[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([tables.images_of(table), *groups.values()])


def _check_models(models: dict[str, Output], embeddings: Output) -> None:
    info = embeddings.read_json(INFO)
    for name, model in models.items():
        dim = model.read_json(MODEL)["dim"]
        if (info["tokens"], info["dim"]) != (1, dim):
            raise UserError(
                f"evaluate: {name} was trained on one vector of width {dim} an image, the gallery's embeddings have "
                f"{info['tokens']} of width {info['dim']}; embed the gallery with the tower of the model"
            )


def check_attributes(file: str) -> dict[str, Any]:
    """Attributes by key. Raises UserError when the file is not a JSON object."""
    try:
        content = read_json(file)
    except UserError as error:
        raise UserError(f"evaluate.attributes: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"evaluate.attributes: {file} holds a {type(content).__name__}, expected an object: key -> attributes")
    return content


def _attribute_classes(file: str, gallery: Output, queries: pa.Table) -> dict[int, int]:
    """A number for each image's attributes. Raises UserError when the file is unreadable or a target has none."""
    content = check_attributes(file)
    ids = keys(gallery)
    texts = {ids[key]: json.dumps(value, sort_keys=True) for key, value in content.items() if key in ids}
    without = set(queries["target_id"].to_pylist()) - set(texts)
    if without:
        name = next(key for key, image in ids.items() if image in without)
        raise UserError(f"evaluate.attributes: {file} has no attributes of {len(without)} target images, such as {name!r}")
    numbers = {text: i for i, text in enumerate(sorted(set(texts.values())))}
    return {image: numbers[text] for image, text in texts.items()}


def _ranked(inputs: _Inputs, models: dict[str, Output], resources: ActorResources) -> Iterator[None]:
    """Score models in Ray tasks, `resources.actors` at a time; yields as each is finished."""
    task = ray.remote(_rank_model).options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        memory=resources.memory_gb and int(resources.memory_gb * 2**30),
        accelerator_type=resources.accelerator_type,
    )
    waiting = list(models.items())
    running: list[ray.ObjectRef] = []
    while waiting or running:
        while waiting and len(running) < resources.actors:
            running.append(task.remote(*waiting.pop(0), inputs, resources.cpus))
        (finished, *_), running = ray.wait(running)
        ray.get(finished)
        yield


def _rank_model(name: str, model: Output, inputs: _Inputs, cpus: float) -> None:
    """A Ray task: compose all queries and rank the gallery part by part."""
    from cluster.devices import limit_threads

    limit_threads(cpus)
    table, prepared = inputs.queries.read_parts(tables.TRIPLETS), target_side(model)
    rows = Rows.of(table)
    source = Features(inputs.embeddings).open_plain(_images_of(table, inputs.groups))

    def features_of(ids: np.ndarray) -> np.ndarray:
        return prepared(source.take(ids, np.zeros(len(ids), np.int64)))

    batch_size = inputs.config.batch_size
    queries = compose_queries(model, inputs.embeddings, (inputs.gallery,), rows.reference_ids, rows.first(), batch_size)
    parts = (read_part(inputs.embeddings, part) for part in plain_parts(inputs.embeddings))
    blocks = ((ids, prepared(values)) for ids, values in parts)
    top = max(10, *inputs.config.recalls)
    ranked = metrics.rank(queries, blocks, rows.reference_ids, rows.target_ids, features_of(rows.target_ids), top)
    if inputs.classes is None:
        correct = ranked.image_ids == rows.target_ids[:, None]
    else:
        correct = metrics.correct_by_attributes(ranked.image_ids, rows.target_ids, inputs.classes)
    columns = {
        "triplet_id": table["triplet_id"],
        "image_ids": list(ranked.image_ids),
        "correct": list(correct),
        "target_rank": ranked.target_rank,
        "subset_rank": _subset_ranks(queries, table, inputs.groups, features_of),
        "reference_first": ranked.reference_first,
    }
    inputs.output.write_table(_ranking(name), pa.table(columns, schema=RANKINGS), RANKINGS)


def _subset_ranks(
    queries: np.ndarray, table: pa.Table, groups: dict[int, np.ndarray], features_of: Callable[[np.ndarray], np.ndarray]
) -> list[int | None]:
    """Rank of each query's target among the members of its group other than the reference; None without members."""
    rows = {i: groups[group] for i, group in enumerate(table["group_id"].to_pylist()) if group in groups}
    if not rows:
        return [None] * len(table)
    grouped, members = np.array(list(rows)), list(rows.values())
    references, targets = table["reference_id"].to_numpy()[grouped], table["target_id"].to_numpy()[grouped]
    ranks = metrics.subset_ranks(queries[grouped], members, features_of(np.concatenate(members)), references, targets)
    found = dict(zip(rows, ranks.tolist(), strict=True))
    return [found.get(i) for i in range(len(table))]


def _metrics_of(ranking: pa.Table, config: EvaluateConfig, exact: bool) -> dict[str, np.ndarray]:
    """Metric -> hits in 0..1 of each query [queries]."""
    correct = np.stack(ranking["correct"].to_numpy())
    ranks = ranking["target_rank"].to_numpy()
    hits: dict[str, np.ndarray] = {f"R@{k}": np.asarray(correct[:, :k].any(axis=1)) for k in config.recalls}
    if exact:
        hits |= {f"exact R@{k}": ranks <= k for k in config.recalls}
    subset = ranking["subset_rank"].drop_null().to_numpy()
    if len(subset):
        hits |= {f"Rs@{k}": subset <= k for k in config.subset_recalls}
    hits["reference first"] = ranking["reference_first"].to_numpy()
    return {name: values.astype(np.float64) for name, values in hits.items()}


def _seeds(hits: dict[str, dict[str, np.ndarray]]) -> dict[str, list[dict[str, np.ndarray]]]:
    """The models of each variant, in order of seed."""
    variants: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    for name in sorted(hits, key=lambda name: int(name.rpartition(".s")[2])):
        variants[name.rpartition(".s")[0]].append(hits[name])
    return {name.rpartition(".s")[0]: variants[name.rpartition(".s")[0]] for name in hits}


def _by_variant(hits: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> metric -> {"mean", "seeds"}, in percent."""
    return {
        variant: {
            metric: {"mean": float(np.mean(means)), "seeds": means}
            for metric in models[0]
            if (means := [100.0 * float(model[metric].mean()) for model in models])
        }
        for variant, models in _seeds(hits).items()
    }


def _gains(hits: dict[str, dict[str, np.ndarray]], config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """variant -> its gain over the baseline in the first recall, hits averaged over seeds; empty without a baseline."""
    metric = f"R@{config.recalls[0]}"
    means = {variant: _mean([model[metric] for model in models]) for variant, models in _seeds(hits).items()}
    if (baseline := means.pop(config.baseline, None)) is None:
        return {}
    return {
        variant: {
            "baseline": config.baseline,
            "metric": metric,
            **asdict(metrics.paired_bootstrap(values, baseline, config.resamples)),
        }
        for variant, values in means.items()
    }


def _mean(hits: list[np.ndarray]) -> np.ndarray:
    return np.stack(hits).mean(axis=0)
