"""What labels are worth: those of the queue beside as many at random, given by a labeller that knows what the photos show.

python tests/benchmarks/bench_labels.py --root outputs --run grocery    a finished run with pseudo triplets
"""

import argparse
import json
import statistics
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from labeller import Labeller

from cluster.app import runner
from cluster.app.api import Run
from cluster.app.config import RunConfig
from cluster.app.graph import Graph
from cluster.app.labels import Judged, Labelling, freeze, precision
from mining.gallery import keys

WAYS = ("queue", "random")
METRICS = ("R@1", "R@5", "R@10")


def pairs(labelling: Labelling, way: str, count: int) -> Iterator[tuple[int, str]]:
    """The pairs to judge, one by one, each after the last one was judged."""
    if way == "random":
        yield from ((triplet, "uniform") for triplet in labelling.order[:count])
        return
    for _ in range(min(count, len(labelling.rows))):
        yield labelling.queue(1)[0]


def label(run: Run, way: str, seed: int, count: int, labeller: Labeller) -> tuple[str, Labelling]:
    """The file of what was judged right or edited, in a store of its own."""
    name = f"{run.graph.config.name}-{way}{seed}-{uuid.uuid4().hex[:8]}"
    graph = Graph(run.graph.config.model_copy(update={"name": name}))
    graph.evaluation.recall(graph.root, run.graph.evaluation.digest)
    mine = Run(graph)
    labelling, rng = Labelling(mine, seed), np.random.default_rng(seed)
    known = {image_id: key for key, image_id in keys(labelling.gallery).items()}
    for triplet, reason in pairs(labelling, way, count):
        row = labelling.rows[triplet]
        images = (known[row["reference_id"]], known[row["target_id"]])
        verdict, text = labeller.judge(*images, row["deltas"], rng)
        fields: dict[str, Any] = {"verdict": verdict, "text": text, "reason": reason}
        labelling.judge(Judged(label_id=str(uuid.uuid4()), triplet_id=triplet, **fields), "simulated")
    (frozen,) = freeze(mine)
    return frozen.file, labelling


def true_precision(labelling: Labelling, labeller: Labeller) -> float:
    """Of every delta of the run."""
    known = {image_id: key for key, image_id in keys(labelling.gallery).items()}
    rng = np.random.default_rng(0)
    verdicts = [
        labeller.judge(known[row["reference_id"]], known[row["target_id"]], row["deltas"], rng)[0]
        for row in labelling.rows.values()
    ]
    return float(np.mean([verdict == "right" for verdict in verdicts]))


def trained(config: RunConfig, files: dict[str, str], seeds: list[int]) -> Graph:
    """`supervised` alone and with each file of labels, trained and evaluated."""
    labelled, content = config.train.triplets, config.model_dump(mode="json")
    source, variant = content["ingest"]["triplets"][labelled], content["train"]["variants"]["supervised"]
    content["ingest"]["triplets"] |= {
        n: source | {"file": [*config.ingest.triplets[labelled].file, f]} for n, f in files.items()
    }
    content["train"]["variants"] = {"supervised": variant} | {name: variant | {"triplets": name} for name in files}
    content["train"]["seeds"], content["name"] = seeds, f"{config.name}-labels"
    graph = Graph(RunConfig.model_validate(content))
    runner.run(graph, graph.stages, keep_config=True)
    return graph


def main() -> None:
    """Label, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="outputs")
    parser.add_argument("--run", help="beside its labelled triplets lies attributes.train.json")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.run is None:
        print("--run NAME: needs a finished run, such as that of `vdg run grocery`")
        return
    run = Run.open(arguments.root, arguments.run)
    config = run.graph.config
    (file,) = map(Path, config.ingest.triplets[config.train.triplets].files)
    labeller = Labeller(json.loads(file.with_name("attributes.train.json").read_text()), json.loads(file.read_text()))
    files: dict[str, str] = {}
    for way in WAYS:
        for seed in arguments.seeds:
            files[f"{way}{seed}"], labelling = label(run, way, seed, arguments.count, labeller)
            _report(way, seed, labelling)
    print(f"every delta judged: {true_precision(Labelling(run), labeller):.1%} are right")
    _table(runner.metrics_of(trained(config, files, arguments.seeds)), arguments.seeds)


def _report(way: str, seed: int, labelling: Labelling) -> None:
    labels = labelling.labels()
    counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(one["verdict"] for one in labels.values()).most_common())
    measured = labelling.precision() if way == "queue" else precision(labels.values())
    print(f"{way}, seed {seed}: {counts}; {measured}")


def _table(metrics: dict[str, Any], seeds: list[int]) -> None:
    """Each way's mean over the draws of labels and the seeds of training, and how far both spread."""
    print(f"{'trained on':32} " + " ".join(f"{name:>14}" for name in METRICS))
    for title, names in [("the labelled triplets", ["supervised"])] + [
        (f"and the labels of the {way}", [f"{way}{seed}" for seed in seeds]) for way in WAYS
    ]:
        values = {metric: [value for name in names for value in metrics[name][metric]["seeds"]] for metric in METRICS}
        cells = (f"{statistics.mean(v):6.2f} ± {statistics.pstdev(v):4.2f}" for v in values.values())
        print(f"{title:32} " + " ".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
