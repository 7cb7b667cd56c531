"""Decoding prompts of one length: their common beginning is computed once, and rows that have ended leave the batch.

On a GPU a step is a CUDA graph, captured when a (number of rows, length) first comes up: launching a step's kernels one by one
takes longer than they do.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vdg.backbones.base import choose
from vdg.config import GenerateConfig

FEWEST_ROWS = 16  # of a step on a GPU: one of fewer takes as long


class Decoder:
    """Continues prompts by a causal language model of transformers, whose weights stay what and where they are."""

    def __init__(self, model: Any, end: int) -> None:
        """`end`: the token that closes a text."""
        self.model, self.end = model, end
        self._room, self._cache = (0, 0), DynamicCache()  # (rows, tokens) that the cache has room for
        self._steps: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def __call__(self, common: Tensor, rest: Tensor, config: GenerateConfig, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, N] after B prompts, N at most `max_new_tokens`, and their log-probabilities float32 (nats).

        The latter under the model's own distribution; after its `end` a row holds anything. All prompts begin with the ids
        `common` int64 [1, C], C may be 0; `rest` are embeddings [B, T, width] of what follows. What is drawn for a row
        depends on neither the others nor on when they end.
        """
        rows = torch.arange(self._places(len(rest)), device=rest.device)  # of the batch, in the order of the cache's
        ended = rows >= len(rest)
        ids = torch.full((len(rows), config.max_new_tokens), self.end, device=rest.device)
        scores = torch.zeros(ids.shape, device=rest.device)
        generator, length = torch.Generator(rest.device).manual_seed(seed), common.shape[1] + rest.shape[1]
        self._prepare(len(rows), length + config.max_new_tokens - 1)
        logits = self._begin(common, rest, rows)
        for place in range(config.max_new_tokens):
            chosen = choose(logits, config, rows, len(ids), generator)
            ids[rows, place] = chosen
            scores[rows, place] = -functional.cross_entropy(logits, chosen, reduction="none")
            ended[rows] |= chosen == self.end
            left = int((~ended).sum())
            if not left or place + 1 == config.max_new_tokens:
                break
            if (size := _doubling(max(left, self._fewest))) < len(rows):
                kept = ended[rows].int().argsort(stable=True)[:size]
                self._cache.reorder_cache(cast(torch.LongTensor, kept))
                rows, chosen = rows[kept], chosen[kept]
            logits = self._step(chosen, length + place)
        return ids[: len(rest), : place + 1], scores[: len(rest), : place + 1]

    @property
    def _captured(self) -> bool:
        on_gpu, whole = self.model.device.type == "cuda", getattr(self.model, "_can_compile_fullgraph", False)
        return on_gpu and whole and all(isinstance(layer, _Room) for layer in self._cache.layers)

    @property
    def _fewest(self) -> int:
        return FEWEST_ROWS if self.model.device.type == "cuda" else 1

    def _places(self, rows: int) -> int:
        """Rows of the cache for a batch: a captured step serves all batches of about its size."""
        return _doubling(max(rows, self._fewest)) if self.model.device.type == "cuda" else rows

    def _prepare(self, rows: int, tokens: int) -> None:
        """Make an empty cache; one that has room is used again, as captured steps know where it is."""
        if rows <= self._room[0] and tokens == self._room[1] and self._captured:
            self._set_length(0)
            return
        self._steps.clear()
        self._room, self._cache = (rows, tokens), DynamicCache(config=self.model.config)
        self._cache.layers = [_Room(rows, tokens) if type(one) is DynamicLayer else one for one in self._cache.layers]
        if self._captured:
            self._chosen = torch.zeros(rows, dtype=torch.int64, device=self.model.device)
            self._logits = torch.empty(rows, self.model.config.get_text_config().vocab_size, device=self.model.device)
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def _set_length(self, length: int) -> None:
        for layer in self._cache.layers:
            cast(_Room, layer).length = length

    def _begin(self, common: Tensor, rest: Tensor, rows: Tensor) -> Tensor:
        """Logits float32 [rows, vocabulary] after the prompts."""
        if common.shape[1]:
            self._forward(input_ids=common)
            self._cache.reorder_cache(cast(torch.LongTensor, torch.zeros_like(rows)))
        return functional.pad(self._forward(inputs_embeds=rest), (0, 0, 0, len(rows) - len(rest)))

    def _step(self, chosen: Tensor, length: int) -> Tensor:
        """Logits float32 [rows, vocabulary] after one more token [rows], of rows that are `length` long."""
        if not self._captured:
            return self._forward(input_ids=chosen[:, None])
        rows = len(chosen)
        self._chosen[:rows] = chosen
        if (rows, length) not in self._steps:
            self._steps[rows, length] = self._capture(rows)
        self._steps[rows, length].replay()
        self._set_length(length + 1)
        return self._logits[:rows]

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            self._logits[:rows] = self._forward(input_ids=self._chosen[:rows, None])
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph

    def _forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()


class _Room(DynamicLayer):
    """A layer's keys and values in memory that is taken once: they grow in place, and a captured step finds them again."""

    def __init__(self, rows: int, tokens: int) -> None:
        super().__init__()
        self.shape, self.length = (rows, tokens), 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory: [rows, heads, tokens, dim] each."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        rows, tokens = self.shape
        self.rooms = [states.new_empty(rows, states.shape[1], tokens, states.shape[3]) for states in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of the rows, with these added."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.length = self.length, self.length + key_states.shape[2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[: len(states), :, first : self.length] = states
        self.keys, self.values = (room[: len(key_states), :, : self.length] for room in self.rooms)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put these rows first, in this order."""
        for room in self.rooms:
            room[: len(beam_idx), :, : self.length] = room[beam_idx, :, : self.length]


def _doubling(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()
