"""What a finished run, or an exported model alone, can do from Python.

run = Run.open("outputs", "demo")
run.search("photo.jpg", "the same in green", top=20)  # by the recommended model
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cir.evaluate import METRICS
from cir.index import Thumbnails
from cir.rerank import RERANKED
from cir.search import Hits, Model, Reference, Searcher
from cir.select import written_scores
from cir.train import ModelName
from cluster.app.export import TOWER, export
from cluster.app.graph import Graph, ancestors
from cluster.app.outputs import CONFIG, kept_config
from cluster.app.recommend import recommend
from cluster.app.runner import metrics_of, run
from cluster.artifacts import MANIFEST, Output, below, filesystem, outputs_of
from cluster.config import validate
from cluster.driver.lineage import Lineage
from cluster.errors import Rejected, UserError
from cluster.stage import Stage
from cluster.verify import verify
from mining import tables
from mining.config import TowerConfig
from mining.gallery import keys
from mining.images import decode
from mining.ingest import IngestGallery
from vdg.explain import Explainer, Explanation
from vdg.generate import Generate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Hit:
    """An image that was found."""

    rank: int  # from 1
    image_id: int
    key: str
    score: float  # cosine with the query


class Run:
    """A finished run: its models search the gallery of the config's evaluate section."""

    def __init__(self, graph: Graph) -> None:
        """Raises UserError when the run has no models, or is not evaluated."""
        config = graph.config
        if config.evaluate.embeddings is not None:
            raise UserError(f"{config.name}: scores given embeddings; there is no model to search with")
        if graph.output(graph.evaluation).manifest() is None:
            raise UserError(
                f"{config.name}: is not evaluated below {Output(graph.root).uri}: `vdg run` does what is missing. What another "
                "version of this package has made has other digests: `Run.open` opens it"
            )
        verify(graph.output(stage) for stage in graph.evaluation.parents.values())
        self.graph = graph

    @classmethod
    def open(cls, root: str, name: str) -> "Run":
        """A run by its name, below the root folder of its outputs, as its last evaluation ranked it.

        Its manifest names the models, whatever today's code would make of the config. Raises UserError when there is none.
        """
        folder = Output(below(root, f"runs/{name}"))
        if not folder.exists(CONFIG):
            raise UserError(f"{folder.path(CONFIG)}: does not exist; give the root and the name of a run that was done")
        graph = Graph(kept_config(folder, root=root))
        if graph.output(graph.evaluation).manifest() is None and (digest := _last_evaluation(graph, folder)):
            graph.evaluation.recall(root, digest)
        return cls(graph)

    @cached_property
    def models(self) -> dict[str, Output]:
        """Every trained model, by its name (cir.train.ModelName)."""
        return {name: self.graph.output(model) for name, model in self.graph.models.items()}

    @cached_property
    def searcher(self) -> Searcher:
        """All models over the gallery; each is loaded when it is first asked for."""
        config, parents = self.graph.config, self.graph.evaluation.parents
        embeddings, gallery = (self.graph.output(parents[role]) for role in ("embeddings", "gallery"))
        return Searcher(self.models, embeddings, gallery, config.embed.towers[config.train.tower])

    @cached_property
    def thumbnails(self) -> Thumbnails:
        """Of the gallery's images. They are made on Ray, once."""
        assert self.graph.index is not None
        return Thumbnails(self._made(self.graph.index))

    def _made(self, stage: Stage) -> Output:
        """The output of a stage beside the run. All of them are made where one is missing, so that Ray starts once."""
        ready = [beside for beside in self.graph.beside if self._finished(*beside.parents.values())]
        if not self._finished(*ready):
            run(self.graph, ready)
        verify([self.graph.output(stage)])
        return self.graph.output(stage)

    def _finished(self, *stages: Stage) -> bool:
        return all(self.graph.output(stage).manifest() is not None for stage in stages)

    def reference(self, image: str | Path | bytes | int) -> Reference:
        """An image to start from: a file, encoded bytes, or an image of the gallery by its key or id.

        Raises UserError when it is none of these.
        """
        if isinstance(image, int):
            try:
                return self.searcher.known(image)
            except KeyError:
                raise UserError(f"image {image}: the gallery has no image of this id") from None
        if isinstance(image, str) and not Path(image).is_file():
            return self.searcher.known(self.searcher.image_id(image))
        try:
            content = image if isinstance(image, bytes) else Path(image).read_bytes()
            pixels = self.searcher.encoder.pixels(decode(content, self.graph.config.ingest.max_pixels))
            return self.searcher.uploaded(content, pixels)
        except (OSError, Rejected) as error:
            name = "the image" if isinstance(image, bytes) else image
            raise UserError(f"{name}: cannot be read ({error}); give an image file or a key of the gallery") from error

    @cached_property
    def recommended(self) -> str:
        """The model to use unless another is asked for; without a baseline to compare with the first one."""
        found = recommend(self.graph)
        return found.model if found else next(iter(self.models))

    def chosen(self, models: str | None) -> list[str]:
        """The models of some names, with commas between, or the recommended one. Raises UserError when one is unknown."""
        asked = [self.recommended] if models is None else models.split(",")
        if unknown := set(asked) - set(self.models):
            raise UserError(f"--models {min(unknown)}: there is none of this name; give some of {', '.join(self.models)}")
        return list(dict.fromkeys(asked))

    def served(self, models: str | None) -> list[str]:
        """As `chosen`; but where none is named, the recommended one, then the first of every other variant."""
        if models is not None:
            return self.chosen(models)
        first: dict[str, str] = {}
        for name in (self.recommended, *self.models):
            first.setdefault(ModelName.parse(name).variant, name)
        return list(first.values())

    def search(self, image: str | Path | bytes | int, text: str, model: str | None = None, top: int = 20) -> list[Hit]:
        """The `top` images of the gallery for a reference and a text that says what should differ, best first.

        They are ranked by the recommended model unless another is named, and the reference is not among them. Raises
        UserError for an unknown model, or an image that cannot be read.
        """
        model = model or self.recommended
        self.searcher.composer(model)
        return self.hits(self.searcher.search(model, self.reference(image), text, top))

    def hits(self, found: Hits) -> list[Hit]:
        """With names and ranks."""
        rows = zip(found.image_ids.tolist(), self.searcher.keys(found.image_ids), found.scores.tolist(), strict=True)
        return [Hit(rank, *row) for rank, row in enumerate(rows, 1)]

    def metrics(self) -> dict[str, Any]:
        """variant -> metric -> {"mean", "seeds"}, of the evaluation."""
        return metrics_of(self.graph)

    @cached_property
    def pseudo_triplets(self) -> Generate | None:
        """`generate:<gallery>`; None where no model was trained on any."""
        name = f"generate:{self.graph.config.mine.gallery}"
        found = (s for s in self.graph.stages if isinstance(s, Generate) and s.instance == name and self._finished(s))
        return next(found, None)

    def scores(self) -> list[dict[str, Any]]:
        """Every score of the pseudo triplets (tables.SCORES): the generator's own and the round trip, which Ray makes once."""
        stage, round_trip = self.pseudo_triplets, self.graph.round_trip
        if stage is None:
            return []
        found = written_scores(self.graph.output(stage)).to_pylist()
        if round_trip is not None and self._finished(*round_trip.parents.values()):
            found += self._made(round_trip).read_parts(tables.SCORES).to_pylist()
        return found

    @cached_property
    def _explainer(self) -> Explainer:
        if self.pseudo_triplets is None:
            raise UserError(f"{self.graph.config.name}: has no generator; no variant of train.variants has pseudo: true")
        return Explainer(self.graph.output(self.pseudo_triplets.vdg), self.graph.config.generate)

    def explain(self, reference: Reference, image_id: int) -> Explanation:
        """What the generator says turns a reference into an image of the gallery. It is loaded when it is first asked.

        Raises KeyError when the gallery has no such image, UserError when the run has no generator, when its language model is
        not on this machine, or when it does not see what is known of the images.
        """
        explainer, config, known = self._explainer, self.graph.config, reference.image_id
        if config.vdg.tower is None:  # it sees pixels
            if known is None:
                raise UserError(
                    "the generator sees pixels, and those of an upload are not kept: start from a photo of the gallery"
                )
            return explainer.explain(self.searcher.image(known), self.searcher.image(image_id))
        if config.vdg.tower != config.train.tower:
            raise UserError(
                f"the generator sees through the tower '{config.vdg.tower}', the gallery is embedded by '{config.train.tower}'"
            )
        first = reference.vector[None] if known is None else self.searcher.tokens(known)
        candidate = self.searcher.tokens(image_id)
        if len(first) < len(candidate):
            raise UserError(
                f"the generator sees {len(candidate)} vectors of a photo, an upload keeps one: start from the gallery"
            )
        return explainer.explain(first, candidate)

    def triplets(self) -> "pd.DataFrame":
        """The pseudo triplets: reference and target as keys, their first delta, and its log-probability."""
        found = []
        for stage in (stage for stage in self.graph.stages if stage.kind == "generate"):
            made = self.graph.output(stage)
            scores = written_scores(made).to_pylist()
            values = {r["triplet_id"]: r["value"] for r in scores if r["scorer"] == tables.SCORER}
            galleries = [one for one in ancestors(stage) if isinstance(one, IngestGallery)]
            names = {image_id: key for one in galleries for key, image_id in keys(self.graph.output(one)).items()}
            found += [
                {
                    "stage": stage.instance,
                    "reference": names.get(row["reference_id"]),
                    "target": names.get(row["target_id"]),
                    "delta": row["deltas"][0],
                    "log_probability": values.get(row["triplet_id"]),
                }
                for row in made.read_parts(tables.TRIPLETS).to_pylist()
            ]
        return pa.Table.from_pylist(found).to_pandas()

    def export(self, model: str, folder: str | Path) -> list[str]:
        """Write a model into a new folder, as `vdg export` does. Returns notes on what loads how.

        Raises UserError for an unknown model, one whose files have changed, and a folder that has files.
        """
        self.searcher.composer(model)
        lineage, output = Lineage(self.graph.root), self.models[model]
        return export(lineage, next(made for made in lineage.made.values() if made.output == output), Path(folder))


def _last_evaluation(graph: Graph, folder: Output) -> str | None:
    """The digest of the newest evaluation that found what the run's folder says of it."""
    if not folder.exists(METRICS):
        return None
    metrics = {name: row for name, row in folder.read_json(METRICS).items() if not name.endswith(RERANKED)}
    found = []
    for output in outputs_of(graph.root, graph.evaluation.kind):
        manifest = output.manifest()
        if manifest is not None and output.read_json(METRICS) == metrics:
            changed = filesystem(graph.root)[0].get_file_info(output.path(MANIFEST)).mtime_ns
            found.append((changed, manifest["digest"]))
    return max(found)[1] if found else None


def load_model(folder: str | Path) -> Model:
    """An exported retrieval model by itself. Raises UserError when the folder is none, or its tower's weights are missing."""
    path = Path(folder) / TOWER
    if not path.is_file():
        raise UserError(f"{path}: does not exist; give a folder that `vdg export` wrote of a retrieval model")
    tower = validate(TowerConfig, Output(str(folder)).read_json(TOWER), str(path))
    if tower.weights is not None:
        tower.weights.location()
    return Model(Output(str(folder)), tower)
