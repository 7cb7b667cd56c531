"""The DeepSpeed engine of one training process: its process group, optimizer and learning rates, and a step."""

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from cluster.config import TrainingConfig
from cluster.devices import uses_bf16


def load_deepspeed() -> Any:
    """The library. Its tuner would load MLflow, which takes as long as the rest of it, for nothing."""
    unseen = "mlflow" not in sys.modules
    if unseen:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if unseen:
            del sys.modules["mlflow"]
    return deepspeed


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of this process alone, for DeepSpeed; taken down so that the next training can open its own."""
    import torch

    deepspeed = load_deepspeed()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        # gloo would carry a GPU's gradients through the processor's memory
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            if deepspeed.comm.is_initialized():
                deepspeed.comm.destroy_process_group()
                deepspeed.comm.comm.cdb = None
            else:  # the model could not be built
                torch.distributed.destroy_process_group()


def build_engine(module: Any, config: TrainingConfig, world: int) -> Any:
    """A DeepSpeed engine around the module, with one parameter group a learning rate."""
    import torch

    deepspeed = load_deepspeed()
    groups: dict[float, list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rates = [rate for prefix, rate in config.learning_rates.items() if name.startswith(prefix)]
            groups.setdefault(rates[0] if rates else config.learning_rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    # the gradients' norm is only for clipping; ZeRO-3 cannot do without
    norm = {} if config.gradient_clip or config.zero_stage == 3 else {"compute_grad_norm": False}
    micro, accumulation = config.accumulation(world)
    # on CPU gloo does the same work: DeepSpeed's own shared-memory op would be compiled for a minute first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_factor, config)),
        config={
            "train_batch_size": config.batch_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": config.gradient_clip,
            "zero_optimization": {"stage": config.zero_stage, **norm},
            "zero_allow_untested_optimizer": True,
            # looking for an overflow tensor by tensor takes longer than the rest of a step's update; the loop looks at the loss
            "bf16": {"enabled": uses_bf16(config.precision), "check_grad_overflow": False},
            "steps_per_print": 2**31,
        },
    )
    return engine


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Share of the full learning rate at `step`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return 0.1 if config.schedule == "tenth_after_half" and step >= config.steps // 2 else 1.0


def forward_backward(engine: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Train on one micro-batch. Returns its losses."""
    here = {n: value.to(engine.device, non_blocking=True) if hasattr(value, "to") else value for n, value in batch.items()}
    losses = engine(here)
    engine.backward(losses["loss"])
    engine.step()
    return {name: float(value.detach()) for name, value in losses.items()}
