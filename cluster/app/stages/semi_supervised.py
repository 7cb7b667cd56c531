"""The generator, the deltas that it writes, their scores, and the models trained on them, round by round."""

from typing import Any

from cir.config import VariantConfig
from cir.score import SCORE_VERSION, Scoring, score_round_trip
from cir.select import SELECT_VERSION, Pseudo, select_confident, with_own_deltas
from cir.train import TRAIN_VERSION, train_cir
from cluster.app.stages.pairs import Pairs
from cluster.artifacts import Stage
from cluster.weights import content_identity
from mining.features import Features
from mining.mine import PAIRS_VERSION, labelled_pairs
from vdg.generate import GENERATE_VERSION, generate
from vdg.images import Images
from vdg.train import ALIGN_VERSION, INSTRUCT_VERSION, align, instruct


class SemiSupervised(Pairs):
    """The paper's method is round 1. In a further round the generator has also learned from confident deltas of the last.

    Instances of round 1 have plain names, those of round r end in `.r<r>`.
    """

    # --- the generator ---

    @property
    def aligned(self) -> Stage | None:
        """`align:vdg`, where the config has stage 1."""
        config, section = self.config, self.config.align
        if section is None:
            return None
        captions = self.captions(section.captions)
        assert config.vdg.tower is not None
        features, parents = self.features(config.vdg.tower, config.ingest.captions[section.captions].gallery)
        return self._make(
            Stage(
                "align:vdg",
                ALIGN_VERSION,
                self._settings("vdg", "align"),
                lambda output, monitor: align(
                    output, features, self.output(captions), config.vdg, section, config.seed, config.resources.align, monitor
                ),
                {"captions": captions, **parents},
            )
        )

    def generator(self, round_: int = 1) -> Stage:
        """`instruct:vdg`: of round 1 on the labelled triplets, later on confident deltas of the round before too."""
        config, section = self.config, self.config.instruct
        triplets = self.triplets(section.triplets) if round_ == 1 else self._confident(round_ - 1)
        galleries = [config.ingest.triplets[section.triplets].gallery, *([config.mine.gallery] if round_ > 1 else [])]
        aligned, (images, parents) = self.aligned, self._vdg_images(*galleries, crop=section.crop)
        return self._make(
            Stage(
                f"instruct:vdg{_suffix(round_)}",
                INSTRUCT_VERSION,
                self._settings("vdg", "instruct"),
                lambda output, monitor: instruct(
                    output,
                    images,
                    self.output(triplets),
                    self.output(aligned) if aligned else None,
                    config.vdg,
                    section,
                    config.seed,
                    config.resources.instruct,
                    monitor,
                ),
                {"triplets": triplets, **parents, **({"aligned": aligned} if aligned else {})},
            )
        )

    def _vdg_images(self, *galleries: str, crop: bool = True) -> tuple[Features | Images, dict[str, Stage]]:
        """What the generator sees of the galleries' images, and the stages it comes from."""
        if self.config.vdg.tower is not None:
            return self.features(self.config.vdg.tower, *galleries)
        stages = {f"gallery.{name}": self.gallery(name) for name in dict.fromkeys(galleries)}
        return Images(tuple(map(self.output, stages.values())), crop), stages

    def _settings(self, *sections: str) -> dict[str, Any]:
        dumped = {name: content_identity(getattr(self.config, name)) for name in sections}
        return {**dumped, "seed": self.config.seed, "online": self.config.embed.any_online}

    # --- its deltas, and their scores ---

    def pseudo_triplets(self, round_: int = 1) -> Stage:
        """`generate:<gallery>`."""
        return self._generated(f"{self.config.mine.gallery}{_suffix(round_)}", self.pairs, self.config.mine.gallery, round_)

    def _generated(self, name: str, pairs: Stage, gallery: str, round_: int) -> Stage:
        config, model = self.config, self.generator(round_)
        images, parents = self._vdg_images(gallery)
        return self._make(
            Stage(
                f"generate:{name}",
                GENERATE_VERSION,
                {**config.generate.model_dump(mode="json", exclude={"max_reject_fraction"}), "seed": config.seed},
                lambda output, monitor: generate(
                    output,
                    images,
                    self.output(pairs),
                    self.output(model),
                    config.generate,
                    config.seed,
                    config.resources.generate,
                    monitor,
                ),
                {"pairs": pairs, "vdg": model, **parents},
                max_reject_fraction=config.generate.max_reject_fraction,
            )
        )

    def _scores(self, round_: int, judge: Stage) -> Stage:
        """`score:<gallery>.<judge>`: the round trip of every pseudo triplet of a round by one model."""
        config, pseudo, gallery = self.config, self.pseudo_triplets(round_), self.config.mine.gallery
        embeddings, images = self.embeddings(config.train.tower, gallery), self.gallery(gallery)
        return self._make(
            Stage(
                f"score:{gallery}{_suffix(round_)}.{judge.instance.partition(':')[2]}",
                SCORE_VERSION,
                {"gallery_images": config.score.gallery_images, "seed": config.seed},
                lambda output, monitor: score_round_trip(
                    Scoring(
                        output,
                        self.output(pseudo),
                        self.output(judge),
                        self.output(embeddings),
                        self.output(images),
                        config.score,
                        config.seed,
                    ),
                    config.resources.score,
                    monitor,
                ),
                {"pseudo_triplets": pseudo, "model": judge, "embeddings": embeddings, "gallery": images},
            )
        )

    def _confident(self, round_: int) -> Stage:
        """`select:vdg.r<r>`: the labelled triplets and a round's confident ones, that the next generator learns from.

        They are scored by a model that was trained on the round's own deltas.
        """
        config, selection = self.config, self.config.rounds.selection
        labelled, pseudo = self.triplets(config.instruct.triplets), self.pseudo_triplets(round_)
        scores = None
        if selection.by_round_trip:
            scores = self._scores(round_, self.model(config.rounds.judge, config.train.seeds[0], round_))
        return self._make(
            Stage(
                f"select:vdg{_suffix(round_ + 1)}",
                SELECT_VERSION,
                {"selection": selection.model_dump(mode="json")},
                lambda output, monitor: select_confident(
                    output,
                    self._pseudo(pseudo, scores),
                    self.output(labelled),
                    selection,
                    monitor,
                ),
                {"triplets": labelled, "pseudo_triplets": pseudo, **({"scores": scores} if scores else {})},
            )
        )

    def _pseudo(self, triplets: Stage, scores: Stage | None) -> Pseudo:
        return Pseudo(self.output(triplets), self.output(scores) if scores else None)

    def _with_own_deltas(self, name: str) -> Stage:
        """`select:<triplets>.vdg`: labelled triplets, each with the generator's delta of its pair too (PAPER 2.3)."""
        labelled, gallery = self.triplets(name), self.config.ingest.triplets[name].gallery
        pairs = self._make(
            Stage(
                f"mine:{name}",
                PAIRS_VERSION,
                {},
                lambda output, monitor: labelled_pairs(output, self.output(labelled), monitor),
                {"triplets": labelled},
            )
        )
        generated = self._generated(name, pairs, gallery, round_=1)
        return self._make(
            Stage(
                f"select:{name}.vdg",
                SELECT_VERSION,
                {},
                lambda output, monitor: with_own_deltas(output, self.output(labelled), self.output(generated), monitor),
                {"triplets": labelled, "pseudo_triplets": generated},
            )
        )

    # --- retrieval ---

    def model(self, name: str, seed: int, round_: int | None = None) -> Stage:
        """`train:<variant>.s<seed>`; of an earlier round than the variant's own, `train:<variant>.r<r>.s<seed>`."""
        config, variant = self.config, self.config.train.variant(name)
        own = variant.round or config.rounds.count
        used = round_ if round_ and variant.pseudo else own
        triplets = self._with_own_deltas(variant.triplets) if variant.own_deltas else self.triplets(variant.triplets)
        pseudo, scores = (self.pseudo_triplets(used), self._judged(used, variant)) if variant.pseudo else (None, None)
        galleries = [config.ingest.triplets[variant.triplets].gallery, *([config.mine.gallery] if pseudo else [])]
        features, parents = self.features(config.train.tower, *galleries, pixels=variant.model == "blip")
        semi = {"pseudo_triplets": pseudo, "scores": scores}
        return self._make(
            Stage(
                f"train:{name}{'' if used == own else f'.r{used}'}.s{seed}",
                TRAIN_VERSION,
                {**content_identity(variant), "seed": seed, "online": config.embed.any_online},
                lambda output, monitor: train_cir(
                    output,
                    features,
                    self.output(triplets),
                    self._pseudo(pseudo, scores) if pseudo else None,
                    variant,
                    seed,
                    config.resources.train,
                    monitor,
                ),
                {"triplets": triplets, **parents, **{role: stage for role, stage in semi.items() if stage}},
            )
        )

    def _judged(self, round_: int, variant: VariantConfig) -> Stage | None:
        """Round-trip scores that a variant selects by: by the labelled judge, in later rounds by the semi-supervised one."""
        if not variant.selection.by_round_trip:
            return None
        judge = (self.config.score.judge, 1) if round_ == 1 else (self.config.rounds.judge, round_ - 1)
        return self._scores(round_, self.model(judge[0], self.config.train.seeds[0], judge[1]))

    @property
    def models(self) -> dict[str, Stage]:
        """Every variant with every seed, as `<variant>.s<seed>`."""
        train = self.config.train
        return {f"{name}.s{seed}": self.model(name, seed) for name in train.variants for seed in train.seeds}


def _suffix(round_: int) -> str:
    return "" if round_ == 1 else f".r{round_}"
