"""Embed: every image of a gallery, plain and in augmented views, through one frozen tower, once.

CPU tasks decode to uint8, a pool of actors runs the tower and writes: one part a (gallery part, view). Where the tower runs on
CPUs the actors may decode too: the pixels then need not travel.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.artifacts import REJECTS, REUSED, Output, output_of, reject_row
from cluster.config import EmbedResources
from cluster.errors import Rejected, UserError
from cluster.parts import Parts, run_parts_of, timed
from cluster.stage import RunContext, Stage
from cluster.verify import differences
from mining import tables
from mining.config import TowerConfig, ViewsConfig
from mining.embeddings import INFO, gallery_part, plain_parts, view_of, view_part
from mining.gallery import image_bytes
from mining.images import render
from mining.reuse import Earlier, count_reused, note_reused, open_earlier
from mining.sources import BytesReader

if TYPE_CHECKING:
    import ray.data


_reject = partial(reject_row, "embed")
_Decode = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Embed(Stage):
    """`embed:<tower>.<gallery>`: the embeddings of `views.count` views of every image, and `info.json`.

    Of embeddings of an earlier state of the gallery those of images that are the same are taken over: of a grown gallery
    only the new images go through the tower, and `reused.json` counts the others.
    """

    version = 8
    table = "embeddings"
    gallery: Stage
    tower: TowerConfig
    views: ViewsConfig
    resources: EmbedResources

    @property
    def reject_limit(self) -> float:
        """As many images may have become unreadable as the gallery may reject."""
        return self.gallery.reject_limit

    def config_field(self, name: str) -> str:
        """The tower's name is the first part of the instance's."""
        return f"embed.towers.{self.name.partition('.')[0]}" if name == "tower" else f"embed.{name}"

    def joins(self, other: Stage) -> bool:
        """Galleries that one tower looks at."""
        return isinstance(other, Embed) and (other.tower, other.resources) == (self.tower, self.resources)

    def work(self, output: Output, run: RunContext) -> None:
        """Raises UserError when no image can be read."""
        self.work_together([(self, output, run)])

    @classmethod
    def work_together(cls, stages: Sequence[tuple["Embed", Output, RunContext]]) -> None:  # type: ignore[override]
        """In one Ray Data execution, whose actors load the tower once."""
        looks = [Look(run.output(one.gallery), output, one.tower, one.views, one._earlier(run)) for one, output, run in stages]
        parts = [Parts(look.output, look.parts(), run.monitor) for look, (_, _, run) in zip(looks, stages, strict=True)]
        run_parts_of(parts, partial(_embed, looks, stages[0][0].resources), "image")
        for look in looks:
            _summarise(look.output, look.views)
            if look.earlier is not None:
                look.output.write_json(REUSED, count_reused(look.output, plain_parts(look.output)))

    def _earlier(self, run: RunContext) -> Earlier | None:
        """Embeddings of an earlier state of the gallery, where both are still there."""
        found = self.earlier(run.root)
        if found is None:
            return None
        embeddings, manifest = found
        gallery = output_of(run.root, self.gallery.instance, manifest["parents"]["gallery"]["digest"])
        of_gallery = gallery.manifest()
        whole = of_gallery is not None and not differences(gallery, of_gallery)
        return open_earlier(embeddings, gallery) if whole else None


@dataclass(frozen=True)
class Look:
    """How the images of a gallery are seen, and where that is kept."""

    gallery: Output
    output: Output
    tower: TowerConfig
    views: ViewsConfig
    earlier: Earlier | None = None

    def parts(self) -> dict[str, int]:
        """Each with its number of images."""
        return {view_part(part, view): n for part, n in self.gallery.part_rows().items() for view in range(self.views.count)}


def _embed(looks: list[Look], resources: EmbedResources, parts: list[tuple[int, str]]) -> "ray.data.Dataset":
    """Decoding tasks for these parts, each of one of the looks, then the actors that hold the tower."""
    import ray.data

    outputs, tower, tasks = [look.output for look in looks], looks[0].tower, resources.decode_tasks
    names = [{"output": place, "part": name} for place, name in parts]
    rows: ray.data.Dataset = ray.data.from_items(names, override_num_blocks=len(parts))
    decode = partial(_decode_part, looks=looks)
    if tasks:
        pool = ray.data.TaskPoolStrategy(size=tasks)
        rows = rows.map_batches(decode, batch_size=1, num_cpus=resources.decode_cpus, compute=pool)
    return rows.map_batches(
        Embedder,
        fn_constructor_args=(tower, resources.batch_size, outputs, resources.cpus, None if tasks else decode),
        batch_size=1,
        compute=_pool(resources),
        **resources.ray_options(),
    )


def _decode_part(row: dict[str, Any], looks: list[Look]) -> dict[str, Any]:
    """One row: the pixels uint8 [n, size, size, 3] of one view of one gallery part, so that no batch mixes parts.

    Images that were embedded earlier are not decoded: their values float16 come along, as int16, which Arrow tensors know,
    and the name of the output that they are from. Images that can no longer be read are rejected. A part with nothing to
    decode gives one black image: its embeddings may be an empty part, whose shape only the tower knows.
    """
    name, look = str(row["part"][0]), looks[int(row["output"][0])]
    tower, views, earlier = look.tower, look.views, look.earlier
    images = look.gallery.read_table(gallery_part(name), tables.GALLERY)
    known = earlier.find(images, view_of(name)) if earlier else {}
    reader, ids, pixels, rejects = BytesReader(), [], [], []
    for image in images.to_pylist():
        if image["image_id"] in known:
            ids.append(image["image_id"])
            continue
        try:
            pixels.append(render(image_bytes(image, reader), tower, views, (image["image_id"], view_of(name))))
            ids.append(image["image_id"])
        except (Rejected, OSError) as error:
            rejects.append(_reject(image["key"], "unreadable", f"image_id {image['image_id']}: {error}"))
    look.output.write_rejects(name, rejects)
    black = np.zeros((tower.image_size, tower.image_size, 3), np.uint8)
    return {
        "output": row["output"],
        "part": np.array([name]),
        "rows": np.array([len(ids) + len(rejects)]),
        "image_id": np.array([ids], np.int64),
        "pixels": np.stack(pixels or [black])[None],
        "earlier": np.array([earlier.name if earlier else ""]),
        "reused": np.array([[image_id in known for image_id in ids]], np.uint8),
        "values": np.stack([*known.values()] or [np.zeros((1, 1), np.float16)]).view(np.int16)[None],
    }


def _pool(resources: EmbedResources) -> "ray.data.ActorPoolStrategy":
    """On a GPU one part goes through the tower while another is unpacked, moved and written."""
    import ray.data

    together: dict[str, Any] = (
        {"enable_true_multi_threading": True, "max_concurrent_calls_per_actor": 2} if resources.gpus else {}
    )
    return ray.data.ActorPoolStrategy(size=resources.actors, **together)


class Embedder:
    """An actor that holds the tower and turns decoded parts, or such as it decodes, into written parts; threads may call it."""

    def __init__(
        self, config: TowerConfig, batch_size: int, outputs: Sequence[Output], cpus: float, decode: _Decode | None
    ) -> None:
        from cluster.devices import limit_threads
        from cluster.provenance import record_environment
        from mining.towers import ImageTower

        limit_threads(cpus)
        self.tower, self.batch_size, self.outputs, self.decode = ImageTower(config), batch_size, outputs, decode
        self.local = threading.local()
        for output in outputs:
            record_environment(output, config.precision)

    @timed
    def __call__(self, row: dict[str, np.ndarray]) -> dict[str, Any]:
        """Embed and write one row of `_decode_part`, or for it."""
        row = self.decode(row) if self.decode else row
        name, ids, reused = str(row["part"][0]), row["image_id"][0], row["reused"][0].astype(bool)
        output = self.outputs[int(row["output"][0])]
        new = self._embed(row["pixels"][0])
        values = np.empty((len(ids), *new.shape[1:]), np.float16)
        values[~reused] = new[: (~reused).sum()]
        if reused.any():
            values[reused] = row["values"][0].view(np.float16)
        finite = np.isfinite(values).all(axis=(1, 2))
        if not finite.all():
            _reject_values(output, name, ids[~finite])
        table = _to_table(ids[finite], view_of(name), values[finite])
        output.write_table(name, note_reused(table, str(row["earlier"][0]), int((reused & finite).sum())), _schema(values))
        return {"output": row["output"], "part": row["part"], "rows": row["rows"]}

    def _embed(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        batches = [torch.from_numpy(pixels[i : i + self.batch_size].copy()) for i in range(0, len(pixels), self.batch_size)]
        with self._stream():
            return torch.cat([self.tower(batch).half() for batch in batches]).cpu().numpy()

    def _stream(self) -> AbstractContextManager[object]:
        """This thread's own CUDA stream, so that it waits for its own part alone."""
        import torch

        if not torch.cuda.is_available():
            return nullcontext()
        if not hasattr(self.local, "stream"):
            self.local.stream = torch.cuda.Stream()
        return torch.cuda.stream(self.local.stream)


def _reject_values(output: Output, name: str, image_ids: np.ndarray) -> None:
    """Add to a part's rejects those whose values are not finite."""
    path = f"rejects/{name}"
    before = output.read_table(path, REJECTS).to_pylist() if output.exists(path) else []
    wrong = [_reject(str(i), "not_finite", f"image_id {i}: the tower gives NaN, or more than float16 holds") for i in image_ids]
    output.write_rejects(name, before + wrong)


def _schema(values: np.ndarray) -> pa.Schema:
    return tables.embeddings(values.shape[1], values.shape[2])


def _to_table(ids: np.ndarray, view: int, values: np.ndarray) -> pa.Table:
    """Embeddings table of values float16 [n, tokens, dim]."""
    rows, tokens, dim = values.shape
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), tokens * dim)
    columns = [pa.array(ids), pa.array(np.full(rows, view, np.int16)), pa.array(np.full(rows, tokens, np.int16)), lists]
    return pa.table(columns, schema=_schema(values))


def _summarise(output: Output, views: ViewsConfig) -> None:
    """Write `info.json`."""
    tokens, dim = _shape(output)
    output.write_json(INFO, {"tokens": tokens, "dim": dim, "views": views.count})


def _shape(output: Output) -> tuple[int, int]:
    name = next((name for name, rows in output.part_rows().items() if rows), None)
    if name is None:
        raise UserError(f"embed: no image of the gallery can be read any more; bring them back and remove {output.uri}")
    with output.open_parquet(name) as file:
        tokens = file.read_row_group(0, columns=["tokens"])["tokens"][0].as_py()
        return tokens, file.schema_arrow.field("values").type.list_size // tokens
