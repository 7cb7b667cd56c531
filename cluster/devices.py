"""What the processor at hand is good at."""

import math


def device() -> str:
    """The torch device of this process: its GPU where Ray gave it one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def uses_bf16(precision: str) -> bool:
    """Whether to compute in bfloat16: `auto` does where the processor has instructions for it.

    A CPU without them is ten times slower in bfloat16 than in fp32.
    """
    import torch

    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def limit_threads(cpus: float) -> None:
    """Give torch as many threads as Ray gave this process CPUs."""
    import torch

    torch.set_num_threads(math.ceil(cpus))
