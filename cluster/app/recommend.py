"""Which of a finished run's models to use: never one that is worse than the baseline, as far as the run can tell."""

from dataclasses import dataclass

import numpy as np

from cir.evaluate import FOLDS, METRICS
from cir.train import ModelName
from cluster.app.graph import Graph


@dataclass(frozen=True)
class Recommendation:
    """A model, what speaks for it, and whether it has learned from a generator."""

    model: str
    reason: str
    generated: bool


def recommend(graph: Graph) -> Recommendation | None:
    """The best of the variants that learn from the baseline's labels, with its first generator and seed.

    By cross-validation (`evaluate.folds`), or else by the evaluation. None where neither tells, nor names a baseline.
    """
    config, output = graph.config, graph.output(graph.evaluation)
    if not config.evaluate.scores_models or not config.rivals:
        return None
    baseline, folds = config.evaluate.baseline, output.read_json(FOLDS) if output.exists(FOLDS) else {}
    if folds:
        means = {name: float(np.mean(folds[name])) for name in config.rivals}
        metric, how = "MRR", f"by {config.evaluate.folds}-fold cross-validation, each fold held out of the generator too"
    else:
        metrics, metric = output.read_json(METRICS), config.evaluate.headline
        means, how = {name: metrics[name][metric]["mean"] for name in config.rivals}, "by the evaluation's own queries"
    best = max(means, key=lambda name: (means[name], name == baseline))
    others = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items() if name != best)
    reason = f"{metric} {means[best]:.1f}" + (f" against {others}" if others else "") + f", {how}"
    models = [name for name in graph.models if ModelName.parse(name).variant == best]
    return Recommendation(min(models, key=ModelName.parse), reason, config.train.variant(best).uses_generator)
