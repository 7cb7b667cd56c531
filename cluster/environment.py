"""What a stage was computed with: the same digest on another processor gives the same output up to rounding."""

import hashlib
import json
import platform
from importlib.metadata import version

from cluster.artifacts import ENVIRONMENT, Output
from cluster.devices import device, uses_bf16


def record_environment(output: Output, precision: str) -> None:
    """Called by each process that runs a model; the manifest lists what was found, `auto` precision resolved."""
    import torch

    processor = torch.cuda.get_device_name() if device() == "cuda" else f"{platform.machine()} CPU"
    found = {"torch": version("torch"), "processor": processor, "precision": "bf16" if uses_bf16(precision) else "fp32"}
    name = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]  # like processes write the same file
    output.write_json(f"{ENVIRONMENT}/{name}.json", found)
