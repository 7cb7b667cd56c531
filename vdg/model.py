"""The Visual Delta Generator: frozen image features, one trained projection, a language model with LoRA."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from cluster.artifacts import Output
from cluster.errors import UserError
from cluster.training import WEIGHTS, load_trained
from vdg.config import GenerateConfig, Stage, VdgConfig, read_description
from vdg.language import load_language_model, load_tokenizer
from vdg.prompts import IMAGE, clean, pair_prompt

IGNORED = -100  # target of positions that predict no caption token


class VisualDeltaGenerator(nn.Module):
    """Writes what turns the reference image into the target image, from the image tower's outputs.

    Every image token of width `dim` becomes `tokens_per_feature` language-model embeddings through one linear
    projection (paper, section 3.1). `align` trains the projection alone, `instruct` the projection and LoRA.
    """

    def __init__(
        self, config: VdgConfig, dim: int, stage: Stage, dtype: torch.dtype = torch.float32, partitioned: bool = False
    ) -> None:
        """`dtype` and `partitioned` (over the ranks, for ZeRO-3) are the frozen language model's."""
        super().__init__()
        self.config = config
        self.tokenizer = load_tokenizer(config.language_model)
        frozen: Any = load_language_model(config.language_model, dtype, partitioned).requires_grad_(False)
        width = frozen.get_input_embeddings().embedding_dim
        self.language_model: Any = _with_lora(frozen, config) if stage == "instruct" else frozen
        self.projection = nn.Linear(dim, config.tokens_per_feature * width, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Mean next-token cross-entropy over caption and end of text (paper, Eq. 1).

        Args:
            batch: `ids` int64 [B, T] right-padded, with IMAGE where an image embedding goes; `targets` int64 [B, T], the
                token that follows each position or IGNORED; `features` [B, images, tokens, dim] in the order of the slots.

        Padding is on the right, so causal attention needs no mask and positions count from 0. The vocabulary projection,
        a fifth of a small model's work, runs only where some row of the batch has a target.
        """
        targets = batch["targets"]
        positions = (targets != IGNORED).any(0).nonzero().squeeze(1)
        embeddings = self.embed(batch["ids"], batch["features"])
        logits = self.language_model(inputs_embeds=embeddings, logits_to_keep=positions, use_cache=False).logits
        kept = targets[:, positions]
        scored = kept != IGNORED
        return {"loss": functional.cross_entropy(logits[scored].float(), kept[scored])}

    def embed(self, ids: Tensor, features: Tensor) -> Tensor:
        """Embeddings [B, T, width] of ids [B, T], the projected features [B, images, tokens, dim] in the IMAGE slots."""
        embeddings = self.language_model.get_input_embeddings()(ids.clamp(min=0))
        features = functional.dropout(features.to(embeddings.dtype), self.config.feature_dropout, self.training)
        return embeddings.masked_scatter((ids == IMAGE).unsqueeze(-1), self.projection(features).to(embeddings.dtype))

    @torch.no_grad()
    def generate(self, reference: Tensor, target: Tensor, config: GenerateConfig, seed: int) -> tuple[list[str], list[float]]:
        """Deltas of pairs and their scores.

        Args:
            reference, target: features [B, tokens, dim], prepared as in training.
            seed: of the sampling; with `config.greedy` it has no effect.

        Returns:
            B texts (paper's post-processing; may be empty) and B mean log-probabilities (nats) of the generated tokens,
            end of text included, under the model's own distribution: before temperature and top-k.
        """
        ids = self.generate_ids(reference, target, config, recorder := _LogProbabilities(), seed)
        lengths = _lengths(ids, self.tokenizer.eos_token_id)
        texts = [clean(self.tokenizer, row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        spoken = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        means = (recorder.of(ids) * spoken).sum(1) / lengths
        return texts, means.tolist()

    def generate_ids(
        self, reference: Tensor, target: Tensor, config: GenerateConfig, recorder: LogitsProcessor, seed: int
    ) -> Tensor:
        """New ids [B, at most max_new_tokens], decoded with a KV cache until every row has ended."""
        device = self.projection.weight.device
        features = torch.stack([reference, target], 1).to(device)
        image_tokens = reference.shape[1] * self.config.tokens_per_feature
        prompt = torch.tensor(pair_prompt(self.tokenizer, self.config.prompt, image_tokens), device=device)
        ids = prompt.expand(len(reference), -1)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.language_model.generate(
                inputs_embeds=self.embed(ids, features),
                attention_mask=torch.ones_like(ids),
                generation_config=self._decoding(config),
                logits_processor=LogitsProcessorList([recorder]),
            )

    def _decoding(self, config: GenerateConfig) -> GenerationConfig:
        end = self.tokenizer.eos_token_id
        sampling = {} if config.greedy else {"temperature": config.temperature, "top_k": config.top_k}
        return GenerationConfig(
            max_new_tokens=config.max_new_tokens, do_sample=not config.greedy, eos_token_id=end, pad_token_id=end, **sampling
        )

    def merge(self) -> None:
        """Fold LoRA into the language model's weights: as good as free at generation, but no longer trainable."""
        if hasattr(self.language_model, "merge_and_unload"):
            self.language_model = self.language_model.merge_and_unload()


def _with_lora(model: PreTrainedModel, config: VdgConfig) -> nn.Module:
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(
            f"lora_targets {list(config.lora_targets)}: {error}; name this language model's query and value layers"
        ) from error


def _lengths(ids: Tensor, end: int) -> Tensor:
    """Number of generated tokens [B] of ids [B, T], end of text included."""
    ended = (ids == end).int()
    return torch.where(ended.any(1), ended.argmax(1) + 1, ids.shape[1])


class _LogProbabilities(LogitsProcessor):
    """Records the log-probability of each chosen token while `generate` runs.

    It sees the raw logits of a step before temperature and top-k, and at the next step the token that was chosen. So one
    step's logits are held, where `output_logits` holds all: 200 kB a row and token for a vocabulary of 50,000.
    """

    def __init__(self) -> None:
        self.recorded: list[Tensor] = []
        self.logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take a step's logits [B, vocabulary], unchanged; `input_ids` [B, t] are the tokens generated so far."""
        if self.logits is not None:
            self.recorded.append(_log_probability(self.logits, input_ids[:, -1]))
        self.logits = scores
        return scores

    def of(self, ids: Tensor) -> Tensor:
        """Log-probabilities [B, T] of the generated ids [B, T]."""
        if len(self.recorded) < ids.shape[1]:
            assert self.logits is not None
            self.recorded.append(_log_probability(self.logits, ids[:, -1]))
        return torch.stack(self.recorded[: ids.shape[1]], 1)


def _log_probability(logits: Tensor, chosen: Tensor) -> Tensor:
    return -functional.cross_entropy(logits, chosen, reduction="none")  # fused: half the time of a logsumexp


def load_vdg(model: Output, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VisualDeltaGenerator:
    """A trained generator, LoRA merged, ready to generate. Raises UserError when `model` holds no trained generator."""
    description = read_description(model)
    generator = VisualDeltaGenerator(description.vdg, description.dim, description.stage, dtype)
    load_trained(generator, load(model.read_bytes(WEIGHTS)))
    generator.merge()
    return generator.to(device, dtype).eval()
