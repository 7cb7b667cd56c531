"""One training loop for every model: DeepSpeed, precision, validation, checkpoints, resume."""
