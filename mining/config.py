"""Config of the mining stages: ingest, embed, exclude, neighbours, mine."""

from fnmatch import fnmatch
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cluster.config import NOT_CONTENT, Section, path_field
from cluster.weights import Pretrained, Weights

_Positive = Annotated[float, Field(gt=0)]


# a path, or several
Paths = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(lambda paths: [paths] if isinstance(paths, str) else paths, json_schema_input_type=str | list[str]),
]


class GalleryConfig(Section):
    """Where a gallery's images come from."""

    images: str = path_field("folder of images, or tar or Parquet files, or a folder of those; any filesystem URI")
    split: Paths | None = path_field(
        "JSON list of the names to take, or mapping of name to path; several files are joined; None: all", None
    )
    without: str | None = path_field("JSON list of the names to leave out, such as those of test queries", None)
    copy_images: bool = Field(True, description="copy the bytes into the gallery, or index them where they are")


class TripletsConfig(Section):
    """Labelled triplets over one gallery."""

    gallery: str = Field(description="name of the gallery that holds the images")
    file: Paths = path_field(
        "JSON list, JSON lines, CSV or Parquet: reference, target, captions (or caption), optional group or "
        "CIRR's img_set; several files are joined"
    )
    join: bool = Field(
        False, description="of a row's two captions also both in one text, in either order, as FashionIQ's literature trains"
    )


class CaptionsConfig(Section):
    """A file of image-caption pairs over one gallery."""

    gallery: str = Field(description="name of the gallery that holds the images")
    file: str = path_field(
        "JSON list, JSON lines, CSV or Parquet of image (or key) and caption (or text), LLaVA's JSON of "
        "conversations, a WebDataset's tar, or a folder of Parquet or tar files"
    )
    until: str | None = Field(None, description="keep the text before this separator, such as ':'")


class IngestConfig(Section):
    """What enters the run from outside."""

    galleries: dict[str, GalleryConfig] = Field(description="name -> images")
    triplets: dict[str, TripletsConfig] = Field(description="name -> labelled triplets")
    captions: dict[str, CaptionsConfig] = Field({}, description="name -> image-caption pairs")
    shard_rows: int = Field(512, gt=0, description="images of one part: the unit of resume of ingest and embed")
    shard_bytes: int = Field(
        2**28, gt=0, description="encoded bytes of one part, by the sizes that the source lists; a larger image is one alone"
    )
    max_pixels: int = Field(89_478_485, gt=0, description="larger images are rejected as decompression bombs")
    max_reject_fraction: float = Field(0.01, ge=0, le=1, description="share of rejected rows above which a stage fails")


class TowerConfig(Pretrained):
    """A frozen image tower."""

    library: Literal["timm", "open_clip", "transformers"] = Field(description="whose model it is")
    model: str = Field(description="the library's name of the model; for transformers unused when weights name it")
    weights: Weights | None = Field(None, description="None: random, for tests only")
    by_order: bool = Field(False, description="the file's tensors match the model's in order, not by name")
    output: Literal["pooled", "levels", "tokens", "qformer", "projected"] = Field(
        "pooled",
        description="one vector an image; that joined with those of earlier levels and a histogram of colours (timm); one a "
        "patch; one a query of InstructBLIP's or BLIP-2's Q-Former; or BLIP's one of its retrieval space (not normalised)",
    )
    image_size: int = Field(224, gt=0, description="pixels a side")
    resize: Literal["crop", "squash"] = Field("crop", description="shorter side then centre crop, or both sides")
    mean: tuple[float, float, float] | None = Field(
        None, description="of the pixels, 0 to 1; None: the library's for this model"
    )
    std: tuple[_Positive, _Positive, _Positive] | None = Field(
        None, description="of the pixels; None: the library's for this model"
    )
    precision: Literal["fp32", "bf16", "auto"] = Field("auto", description="auto: bf16 where the processor is fast at it")

    @model_validator(mode="after")
    def _transformers_needs_weights(self) -> Self:
        if self.library == "transformers" and self.weights is None:
            raise ValueError("a transformers tower needs 'weights': a hub name or a folder")
        for output, models in (("qformer", "InstructBLIP or BLIP-2"), ("projected", "a BLIP retrieval model")):
            if self.output == output and self.library != "transformers":
                raise ValueError(f"output '{output}' needs 'library: transformers' and the weights of {models}")
        if self.output == "levels" and self.library != "timm":
            raise ValueError("output 'levels' needs 'library: timm'")
        return self

    @property
    def source(self) -> tuple[str, Weights | None]:
        """`weights`."""
        return "weights", self.weights

    @property
    def reads_all(self) -> bool:
        """Of InstructBLIP and BLIP-2 the language model is never read."""
        return self.output != "qformer"

    def check_library(self) -> None:
        """As the library that loads it says."""
        from mining.towers import CHECKS

        if self.library in CHECKS:
            CHECKS[self.library](self)


class TextTower(Pretrained):
    """The encoder of deltas."""

    library: Literal["open_clip", "transformers"] = Field(description="whose model it is")
    model: str | None = Field(None, description="open_clip's name of the architecture; unused where weights name a hub")
    pretrained: str | None = Field(None, description="open_clip's tag of pretrained weights, such as 'openai'")
    weights: Weights | None = Field(None, description="a transformers folder or hub name, or an open_clip checkpoint")
    trained: bool = Field(False, description="train the encoder with the model, or keep it frozen")
    max_length: int = Field(32, gt=0, description="tokens of a delta; longer ones are cut")

    @model_validator(mode="after")
    def _source(self) -> Self:
        if self.library == "transformers" and self.weights is None:
            raise ValueError("a transformers text tower needs 'weights' (a hub name or a folder)")
        if self.library == "open_clip" and self.model is None and not (self.weights and self.weights.hub):
            raise ValueError("an open_clip text tower needs 'model' (such as ViT-L-14) or 'weights.hub'")
        if self.pretrained and self.weights:
            raise ValueError("give 'pretrained' (a tag) or 'weights', not both")
        return self

    @property
    def source(self) -> tuple[str, Weights | None]:
        """`weights`, or the tag of them."""
        return "pretrained" if self.pretrained else "weights", self.weights

    def check_library(self) -> None:
        """As the library that loads it says."""
        from mining.texts import check_text

        check_text(self)


class ViewsConfig(Section):
    """Augmented views of training images: cached ones, or the tower runs online on fresh ones."""

    count: int = Field(1, ge=1, description="cached views an image, the plain one included")
    online: bool = Field(False, description="cache the plain view alone and run the tower while training")
    crop: tuple[_Positive, _Positive] = Field((0.5, 1.0), description="share of the area, from and to")
    aspect: tuple[_Positive, _Positive] = Field((0.8, 1.25), description="width by height, from and to")
    flip: float = Field(0.3, ge=0, le=1, description="probability of a mirrored view")
    jitter: float = Field(0.1, ge=0, description="strength of brightness, contrast and saturation changes")
    rand_augment: tuple[int, int] | None = Field(
        None, description="RandAugment after these: number of operations and magnitude, 0 to 10 (paper: 2, 5)"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.online and self.count > 1:
            raise ValueError("online views are not cached: set count to 1")
        if not (self.crop[0] <= self.crop[1] <= 1 and self.aspect[0] <= self.aspect[1]):
            raise ValueError("crop and aspect are ranges, the smaller value first, and crop is at most 1")
        if self.rand_augment is not None and not (self.rand_augment[0] > 0 and 0 <= self.rand_augment[1] <= 10):
            raise ValueError("rand_augment takes at least one operation and a magnitude of 0 to 10")
        return self


class EmbedConfig(Section):
    """Which towers there are, and the views of training galleries."""

    towers: dict[str, TowerConfig] = Field(description="name -> frozen image tower")
    views: ViewsConfig = Field(ViewsConfig(), description="of every tower and gallery that views_for does not name")
    views_for: dict[str, ViewsConfig] = Field(
        {}, description="other views, by pattern of <tower>.<gallery>, such as 'blip.*'; the first that fits counts"
    )

    def views_of(self, tower: str, gallery: str) -> ViewsConfig:
        """The views of a gallery's images that a tower sees in training."""
        fitting = (views for pattern, views in self.views_for.items() if fnmatch(f"{tower}.{gallery}", pattern))
        return next(fitting, self.views)


class IndexConfig(Section):
    """How an image's neighbours are searched. Whichever index finds them, their similarities are exact."""

    kind: Literal["auto", "exact", "ivf", "ondisk"] = Field(
        "auto",
        description="exact, inverted lists in memory, or inverted lists in a file on the node's disk; "
        "auto: exact up to 200,000 images and on GPUs, ivf up to 1,000,000, then ondisk",
    )
    nlist: int | None = Field(None, gt=0, description="inverted lists; None: 4 x the root of the number of images")
    nprobe: int | None = Field(
        None, gt=0, description="lists searched; None: as few as reach `recall`, one of 32 (or 16 in all) at most"
    )
    recall: float = Field(0.95, gt=0, le=1, description="share of a sample's exact neighbours that is to be found")


class WalkConfig(Section):
    """The paper's subgroups (section 3.2; as CIRR's)."""

    top: int = Field(20, gt=0, description="neighbours of an anchor")
    max_similarity: float = Field(0.94, description="neighbours above are near duplicates")
    spacing: float = Field(0.002, ge=0, description="least distance in similarity to the image added before")
    max_overlap: int = Field(2, ge=0, description="images that two kept groups may share; of matched groups too")
    max_slots: int = Field(
        32, gt=0, description="kept groups that an image may be in; it bounds the work of max_overlap on large galleries"
    )


class MatchedConfig(Section):
    """Pairs whose similarities are distributed as those of the labelled pairs."""

    pairs: int = Field(3000, gt=0, description="expected number of pairs")
    neighbours: int = Field(20, ge=0, description="nearest images offered to each anchor")
    sample: int = Field(1024, gt=0, description="images of the seeded sample of the gallery that a block of anchors is offered")
    bins: int = Field(40, gt=1, description="bins of the histogram of similarity over [-1, 1]")


class RandomConfig(Section):
    """Pairs drawn uniformly: the paper's row without grouping (Table 4)."""

    pairs: int = Field(3000, gt=0, description="number of ordered pairs, drawn without replacement")


class ExcludeConfig(Section):
    """A benchmark whose val and test images are kept out of the pairs."""

    annotations: str = path_field("folder of the benchmark's own annotation files")
    images: str | None = path_field(
        "its images, as in ingest.galleries; None: their names alone are excluded, not what they show", None
    )
    train: bool = Field(False, description="its training images too, where it has some")


BenchmarkName = Literal["cirr", "fashioniq", "circo"]


class MineConfig(Section):
    """How related pairs are found."""

    gallery: str = Field(description="name of a gallery of ingest.galleries: the pool that pairs are found in")
    tower: str = Field(description="name of a tower of embed.towers: what is similar")
    method: Literal["walk", "matched", "matched_groups", "random"] = Field(
        "walk", description="the paper's groups of six, pairs as similar as the labelled ones, those in groups, or any pairs"
    )
    walk: WalkConfig = Field(WalkConfig(), description="of 'walk', and of 'matched_groups' where it says so")
    matched: MatchedConfig = Field(MatchedConfig(), description="of 'matched' and 'matched_groups'")
    random: RandomConfig = Field(RandomConfig(), description="of 'random'")
    index: IndexConfig = Field(IndexConfig(), description="of all methods but 'random'")
    triplets: str | None = Field(None, description="labelled triplets whose similarities the matched pairs imitate")
    exclude: dict[BenchmarkName, ExcludeConfig] = Field(
        {}, json_schema_extra=NOT_CONTENT, description="benchmarks whose val and test images are not mined"
    )
    duplicate_similarity: float = Field(
        0.94, gt=0, le=1, description="cosine above which an image is a near duplicate of an excluded one"
    )
    part_rows: int = Field(
        1024, gt=0, description="pairs of one part, about as many where matched: the unit of resume of generate"
    )

    @model_validator(mode="after")
    def _matched_needs_labels(self) -> Self:
        if self.method.startswith("matched") and self.triplets is None:
            raise ValueError(f"method '{self.method}' needs 'triplets': the labelled pairs to imitate")
        return self
