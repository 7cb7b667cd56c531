"""The Ray session of a driver, with the defaults that long runs need, and quiet terminals."""

import atexit
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from cluster.config import Section
from cluster.errors import UserError
from cluster.training.groups import THREAD

# OpenMP's threads spin at a barrier, by default for milliseconds: on a core that the one they wait for needs, where another
# process has its own. Not to spin at all costs a quarter of an idle machine's speed.
OPENMP = {"GOMP_SPINCOUNT": "1000"}
# glibc gives every large activation back to the kernel and faults it in again at the next layer: twice as slow on a CPU
WORKER_ENVIRONMENT = {
    **OPENMP,
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


class RayConfig(Section):
    """Where Ray runs. Never part of a digest."""

    address: str | None = Field(
        None, description="of a running cluster; None: the cluster that runs this job, else Ray starts on this machine"
    )
    num_cpus: int | None = Field(None, description="logical CPUs of a local Ray; None: what the machine has")

    @property
    def where(self) -> str:
        """The address, or "local". Ray sets the variable for a job's driver."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"


def start(config: RayConfig, log_file: Path | None = None) -> None:
    """Connect to or start Ray, set the Ray Data defaults, and send library chatter to `log_file`.

    Raises UserError when no cluster answers at the config's address.
    """
    import ray

    if log_file is not None:
        _log_to(log_file)
    os.environ.update(OPENMP)  # for what trains in this process: read when torch is loaded
    if not ray.is_initialized():
        address = config.where  # "local" starts one beside any that happens to run on this machine
        local: dict[str, Any] = {"num_cpus": config.num_cpus, "include_dashboard": False} if address == "local" else {}
        environment = {"env_vars": WORKER_ENVIRONMENT}
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # merge it into that of the job which runs this driver
        with _standard_error_to(log_file or Path(os.devnull)):  # the C++ side prints a line of its own
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment, **local)
            except ConnectionError as error:
                why = str(error.__cause__ or error).strip().splitlines()[-1]
                raise UserError(
                    f"resources.ray.address: no Ray cluster takes us at {address}: {why}\n`vdg doctor` checks address and token"
                ) from error
    atexit.register(_leave)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = 2  # a node lost while a model loads is no reason to fail
    context.execution_no_progress_timeout_s = -1  # one batch of a large model may take long
    context.target_max_block_size = 1 << 30  # a block is one part: never split it


def _leave() -> None:
    """End Ray, and wait for threads that waited for it: one that wakes up after Python has ended aborts the process."""
    import ray

    ray.shutdown()
    for thread in threading.enumerate():
        if thread.name.startswith(THREAD):
            thread.join(5)


@contextmanager
def _standard_error_to(path: Path) -> Iterator[None]:
    """Send what native code writes to standard error to a file."""
    terminal = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _log_to(path: Path) -> None:
    """Send every library's log lines and warnings to a file instead of the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("ray", "ray.data", "ray.train"):  # these bring terminal handlers of their own
        logger = logging.getLogger(name)
        for own in [h for h in logger.handlers if not isinstance(h, logging.FileHandler) and hasattr(h, "stream")]:
            logger.removeHandler(own)
        logger.propagate = True
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
