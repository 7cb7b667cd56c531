"""The numbers of an evaluation: metrics over the seeds of each variant, gains, and what each number is."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np

from cir import metrics
from cir.benchmarks.benchmark import Benchmark, Figures
from cir.config import EvaluateConfig


def flat(figures: dict[str, Figures]) -> Figures:
    """Metrics by their whole names: "R@1", or "R@1 (label)" of a label's."""
    return {_named(name, label): values for label, found in figures.items() for name, values in found.items()}


def _named(metric: str, label: str) -> str:
    return f"{metric} ({label})" if label else metric


def protocols(benchmark: Benchmark, figures: list[dict[str, Figures]]) -> list[dict[str, Any]]:
    """Each label, what its numbers are, and its metrics' whole names with their short ones."""
    names = {label: list(found) for entrant in figures[:1] for label, found in entrant.items()}
    texts = "; the texts are the generator's, which has seen the targets" if benchmark.by_generator else ""
    return [
        {
            "label": label,
            "description": description + texts,
            "metrics": {_named(metric, label): metric for metric in names.get(label, [])},
        }
        for label, description in benchmark.descriptions().items()
    ]


def summary(models: list[Figures]) -> dict[str, dict[str, Any]]:
    """Metric -> {"mean", "seeds"} over models that differ in their seed, in percent."""
    return {
        metric: {"mean": float(np.mean(means)), "seeds": means}
        for metric in models[0]
        if (means := [100.0 * float(model[metric].mean()) for model in models])
    }


def by_variant(figures: dict[str, Figures]) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> metric -> {"mean", "seeds"}, from models named "<variant>.s<seed>"."""
    return {variant: summary(models) for variant, models in _seeds(figures).items()}


def gains(figures: dict[str, Figures], config: EvaluateConfig, classes: np.ndarray) -> dict[str, dict[str, Any]]:
    """variant -> its gain over the baseline in the headline, values averaged over seeds; empty without a baseline.

    `gap` is the share that it closes of the gain of the variant `evaluate.oracle`, where there is one that gains. Intervals
    resample `classes`, int [queries]: what each query asks for.
    """
    metric = config.headline
    means = {variant: _mean([model[metric] for model in models]) for variant, models in _seeds(figures).items()}
    if (baseline := means.pop(config.baseline, None)) is None:
        return {}
    return {
        variant: {
            "baseline": config.baseline,
            "metric": metric,
            **asdict(metrics.paired_bootstrap(values, baseline, classes, config.resamples)),
            "gap": _gap(values, baseline, means.get(config.oracle), classes, config.resamples),
        }
        for variant, values in means.items()
    }


def _gap(
    values: np.ndarray, baseline: np.ndarray, oracle: np.ndarray | None, classes: np.ndarray, resamples: int
) -> dict[str, float] | None:
    found = None if oracle is None else metrics.gap_closed(values, baseline, oracle, classes, resamples)
    return None if found is None else asdict(found)


def _seeds(figures: dict[str, Figures]) -> dict[str, list[Figures]]:
    """The models of each variant, in order of seed."""
    variants: dict[str, list[Figures]] = defaultdict(list)
    for name in sorted(figures, key=lambda name: int(name.rpartition(".s")[2])):
        variants[name.rpartition(".s")[0]].append(figures[name])
    return {name.rpartition(".s")[0]: variants[name.rpartition(".s")[0]] for name in figures}


def _mean(hits: list[np.ndarray]) -> np.ndarray:
    return np.stack(hits).mean(axis=0)
