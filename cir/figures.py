"""The numbers of an evaluation: metrics over the seeds of each variant, gains, and what each number is."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np

from cir import metrics
from cir.benchmarks.benchmark import Benchmark, Figures
from cir.config import EvaluateConfig
from cir.train import ModelName


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
    """Metric -> {"mean", "seeds"} over models that differ in their generator and seed alone, in percent."""
    return {
        metric: {"mean": float(np.mean(means)), "seeds": means}
        for metric in models[0]
        if (means := [100.0 * float(model[metric].mean()) for model in models])
    }


def by_variant(figures: dict[str, Figures]) -> dict[str, dict[str, dict[str, Any]]]:
    """variant -> metric -> {"mean", "seeds"}, of its models in the order of their generators, then of their seeds."""
    found: dict[str, list[Figures]] = defaultdict(list)
    for name in sorted(figures, key=ModelName.parse):
        found[ModelName.parse(name).variant].append(figures[name])
    return {variant: summary(found[variant]) for variant in _variants(figures)}


def gains(figures: dict[str, Figures], config: EvaluateConfig, classes: np.ndarray) -> dict[str, dict[str, Any]]:
    """variant -> its gain over the baseline in the headline, values averaged over seeds; empty without a baseline.

    `gap` is the share that it closes of the gain of the variant `evaluate.oracle`, where there is one that gains. Intervals
    resample `classes`, int [queries], what each query asks for, and the variant's generators.
    """
    means = {variant: _by_generator(figures, variant, config.headline) for variant in _variants(figures)}
    if (baseline := means.pop(config.baseline, None)) is None:
        return {}

    def gap(values: np.ndarray) -> dict[str, float] | None:
        oracle = means.get(config.oracle)
        found = None if oracle is None else metrics.gap_closed(values, baseline, oracle, classes, config.resamples)
        return None if found is None else asdict(found)

    return {
        variant: {
            "baseline": config.baseline,
            "metric": config.headline,
            "generators": len(values),
            **asdict(metrics.paired_bootstrap(values, baseline, classes, config.resamples)),
            "gap": gap(values),
        }
        for variant, values in means.items()
    }


def _variants(figures: dict[str, Figures]) -> list[str]:
    return list(dict.fromkeys(ModelName.parse(name).variant for name in figures))


def _by_generator(figures: dict[str, Figures], variant: str, metric: str) -> np.ndarray:
    """Values [generators, queries] of a variant, averaged over seeds."""
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for name in sorted(figures, key=ModelName.parse):
        model = ModelName.parse(name)
        if model.variant == variant:
            found[model.generator].append(figures[name][metric])
    return np.stack([np.mean(values, axis=0) for values in found.values()])
