"""The stage that scores every trained model."""

from cir.config import TextTower
from cir.evaluate import EVALUATE_VERSION, evaluate, evaluate_given
from cluster.app.stages.semi_supervised import SemiSupervised
from cluster.app.stages.sources import given
from cluster.artifacts import Output, Stage, Work
from cluster.monitor import Monitor
from cluster.weights import content_identity


class Evaluation(SemiSupervised):
    """All models on the gallery and queries of the evaluate section."""

    @property
    def evaluation(self) -> Stage:
        """`evaluate:all`; of given embeddings without a model."""
        section, queries = self.config.evaluate, self.triplets("queries")
        if section.embeddings is not None:
            return self._evaluation(self._evaluate_given, {"queries": queries})
        gallery, embeddings = self.gallery("evaluate"), self.embeddings(self.config.train.tower, "evaluate")
        parents = {"queries": queries, "gallery": gallery, "embeddings": embeddings, **self.models}
        return self._evaluation(self._evaluate_models, parents)

    def _evaluation(self, work: Work, parents: dict[str, Stage]) -> Stage:
        section, text = self.config.evaluate, self._shared_text
        paths = {"images", "split", "triplets", "attributes", "annotations", "embeddings"}
        settings = section.model_dump(mode="json", exclude=paths) | {"text": content_identity(text) if text else None}
        sources = given({"evaluate.attributes": section.attributes, "evaluate.embeddings": section.embeddings})
        return self._make(Stage("evaluate:all", EVALUATE_VERSION, settings, work, parents, sources))

    def _evaluate_models(self, output: Output, monitor: Monitor) -> None:
        config = self.config
        evaluate(
            output,
            self.benchmark(),
            self.output(self.embeddings(config.train.tower, "evaluate")),
            self.output(self.gallery("evaluate")),
            {name: self.output(model) for name, model in self.models.items()},
            self._shared_text,
            config.evaluate,
            config.resources.evaluate,
            monitor,
        )

    def _evaluate_given(self, output: Output, monitor: Monitor) -> None:
        section = self.config.evaluate
        assert section.embeddings is not None
        evaluate_given(output, self.benchmark(), section.embeddings, section, self.config.resources.evaluate, monitor)

    @property
    def _shared_text(self) -> TextTower | None:
        """The text encoder, where it and the image tower are the two sides of one model of open_clip."""
        tower, text = self.config.embed.towers[self.config.train.tower], self.config.train.text
        if text is None or (tower.library, text.library) != ("open_clip", "open_clip") or tower.weights != text.weights:
            return None
        weights = text.weights  # a hub's name says the architecture too
        return text if weights and (weights.hub or tower.model == text.model) else None
