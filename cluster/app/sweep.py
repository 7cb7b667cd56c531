"""Cross-validation of one variant on the labelled triplets, for `vdg sweep`."""

from cluster.app import config as configs
from cluster.app import runner
from cluster.app.pipeline import Pipeline
from cluster.errors import UserError


def cross_validate(config: str, assignments: list[str], variant: str, folds: int, metric: str) -> list[float]:
    """The metric on each held-out fold, for every seed of the config; finished trainings are not repeated.

    Raises UserError when the variant or the metric does not exist.
    """
    values = []
    for fold in range(folds):
        held_out = [f"train.validation.folds={folds}", f"train.validation.fold={fold}"]
        loaded = configs.load(config, [*assignments, *held_out])
        if variant not in loaded.train.variants:
            raise UserError(f"--variant {variant}: the config has {sorted(loaded.train.variants)}")
        pipeline = Pipeline(loaded)
        runner.run(pipeline, pipeline.select("train", f"train:{variant}.s*", None))
        for seed in loaded.train.seeds:
            result = pipeline.output(pipeline.model(variant, seed)).read_json("result.json")
            if metric not in result:
                raise UserError(f"--metric {metric}: the trainings report {sorted(result)}")
            values.append(result[metric])
    return values
