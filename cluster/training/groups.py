"""Ray Train worker groups that train one model after another: their processes load torch and DeepSpeed once."""

import gc
import math
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cluster.artifacts import Output, below
from cluster.config import WorkerResources
from cluster.errors import UserError

LEAVE = 15.0  # seconds in which the workers of a group have gone
THREAD = "vdg"  # begins the names of threads that wait for Ray
WORTH = 2.0  # starts of its workers, which a job that takes longer is worth
POLL = 0.2  # seconds between looks into the mailbox
FOLDER = ".workers"  # of a group's first output: what Ray Train keeps of the group
Job = Callable[[Callable[[Any], None]], None]  # done by every worker; what it is given takes reports, of rank 0 alone


@dataclass
class Mailbox:
    """An actor between a driver and a group: the job at hand, and what its first worker says of it."""

    number: int = 0
    job: bytes | None = None
    closed: bool = False
    finished: bool = True
    mistake: UserError | None = None

    def __post_init__(self) -> None:
        self.reports: list[Any] = []

    def give(self, job: bytes) -> None:
        """The next job, pickled: the mailbox need not know its class."""
        self.number, self.job, self.finished, self.mistake = self.number + 1, job, False, None

    def take(self, after: int) -> tuple[int, bytes | None, bool]:
        """(its number, the job in progress if it is later than `after`, whether there will be no more)."""
        job = self.job if self.number > after and not self.finished else None
        return self.number, job, self.closed

    def report(self, content: Any) -> None:
        """Of the job in progress."""
        self.reports.append(content)

    def finish(self, mistake: UserError | None) -> None:
        """The job is done, or the user has made a mistake."""
        self.finished, self.job, self.mistake = True, None, mistake

    def heard(self) -> tuple[list[Any], bool, UserError | None]:
        """(reports since the last time, whether the job is finished, the user's mistake)."""
        reports, self.reports = self.reports, []
        return reports, self.finished, self.mistake

    def close(self) -> None:
        """There will be no more jobs."""
        self.closed = True


class Group:
    """Workers of one shape, until it is closed or has failed more often than that allows."""

    def __init__(self, shape: WorkerResources, place: Output, reserve: bool) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.shape, self.place, self.reserve = shape, Output(below(place.uri, FOLDER)), reserve
        actor: Any = ray.remote(Mailbox)
        self.mailbox = actor.options(num_cpus=0, scheduling_strategy=here).remote()
        self.error: BaseException | None = None
        self.made, self.start = time.monotonic(), math.inf  # when, and the seconds of its start
        self.longest: dict[float, float] = defaultdict(float)  # CPUs a worker of a job -> seconds of the longest
        self.thread = threading.Thread(target=self._fit, daemon=True, name=f"{THREAD} workers")
        self.thread.start()

    def _fit(self) -> None:
        import ray.train
        from ray.train.torch import TorchTrainer

        system, base = self.place.location
        system.create_dir(base, recursive=True)
        trainer = TorchTrainer(
            _serve,
            train_loop_config={"mailbox": self.mailbox},
            scaling_config=_scaling(self.shape, self.reserve),
            run_config=ray.train.RunConfig(
                name=uuid.uuid4().hex,
                storage_path=base,
                storage_filesystem=system,
                failure_config=ray.train.FailureConfig(max_failures=self.shape.max_failures),
            ),
        )
        try:
            trainer.fit()
            self.kill()  # the mailbox alone is left
        except (Exception, SystemExit) as error:  # for the thread that waits for a job; Ray leaves with the latter
            self.error = error
        finally:
            with suppress(OSError):
                system.delete_dir(base)

    def train(self, job: Job, cpus: float, heard: Callable[[Any], None]) -> None:
        """Do a job with as many threads a worker, and pass on what is reported.

        Raises a user's mistake, and what ended the group.
        """
        import ray
        from ray import cloudpickle

        ray.get(self.mailbox.give.remote(cloudpickle.dumps((job, cpus))))
        finished, mistake, begun = False, None, math.inf
        while not finished:
            time.sleep(POLL)
            alive = self.thread.is_alive()
            reports, finished, mistake = ray.get(self.mailbox.heard.remote())
            for report in reports:
                begun = min(begun, time.monotonic())
                self.start = min(self.start, begun - self.made)
                heard(report)
            self.longest[cpus] = max(self.longest[cpus], time.monotonic() - begun)
            if not alive and not finished:
                raise self.error or RuntimeError("the workers ended before their job")
        if mistake is not None:
            raise mistake

    def close(self) -> None:
        """Let the workers go."""
        self.mailbox.close.remote()

    def kill(self) -> None:
        """End the mailbox. Without its mailbox a group that is at work fails at its next report."""
        import ray

        ray.kill(self.mailbox)


class Groups:
    """The groups of a run that work or wait for their next job. A context manager that lets all go; threads may share it."""

    def __init__(self, shared: bool = True) -> None:
        """`shared`: whether other runs use this Ray too. Where none does, workers on CPUs alone reserve none there."""
        self.shared = shared
        self.made: list[Group] = []
        self.failed: list[Group] = []
        self.idle: list[Group] = []
        self.busy: list[Group] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "Groups":
        return self

    def __exit__(self, *_: object) -> None:
        self.keep([])
        for group in self.made:
            group.thread.join(0 if group in self.failed else LEAVE)

    @contextmanager
    def take(self, resources: WorkerResources, place: Output) -> Iterator[Group]:
        """A group of their shape for a job; one that failed is not used again."""
        shape = self.shape(resources)
        with self.lock:
            found = next((group for group in self.idle if group.shape == shape and group.thread.is_alive()), None)
            if found is not None:
                self.idle.remove(found)
        group = found or Group(shape, place, self.reserve(resources))
        with self.lock:
            self.busy.append(group)
            self.made += [] if found else [group]
        healthy = False
        try:
            yield group
            healthy = True
        except UserError:
            healthy = True
            raise
        finally:
            with self.lock:
                self.busy.remove(group)
                (self.idle if healthy else self.failed).append(group)
            if not healthy:
                group.kill()

    def reserve(self, resources: WorkerResources) -> bool:
        """Whether workers take from Ray what they are to use, also while they wait: else others could not start beside them."""
        return self.shared or resources.gpus > 0 or resources.memory_gb is not None

    def shape(self, resources: Any) -> Any:
        """What one group's jobs have in common. Workers that reserve nothing take jobs of any number of threads."""
        if not isinstance(resources, WorkerResources) or self.reserve(resources):
            return resources
        return resources.model_copy(update={"cpus": 1.0})

    def waiting(self, resources: Any) -> bool:
        """Whether a group of their shape waits for a job."""
        with self.lock:
            return any(group.shape == self.shape(resources) for group in self.idle)

    def worth(self, resources: WorkerResources, at_work: int) -> bool:
        """Whether a job should begin beside as many of its shape: a group waits for it, or another is worth its start.

        It is once a job of these resources has taken `WORTH` times as long as its workers took to start. Short jobs are done
        sooner one after another by workers that are there; long ones have lost little.
        """
        shape = self.shape(resources)
        with self.lock:
            there = [group for group in self.idle + self.busy if group.shape == shape and group.thread.is_alive()]
            known = [group for group in self.made if group.shape == shape]
        return at_work < len(there) or any(group.longest[resources.cpus] > WORTH * group.start for group in known)

    def keep(self, wanted: list[Any]) -> None:
        """Let go of the groups that wait beyond one for each of these resources; a group at work counts."""
        with self.lock:
            left = Counter(repr(self.shape(one)) for one in wanted) - Counter(repr(group.shape) for group in self.busy)
            for group in list(self.idle):
                if left[repr(group.shape)] <= 0:
                    self.idle.remove(group)
                    group.close()
                left[repr(group.shape)] -= 1


def _scaling(resources: WorkerResources, reserve: bool) -> Any:
    import ray.train

    # a byte, where they are to take nothing: Ray places nothing that asks for nothing
    wanted: dict[str, float] = {"CPU": resources.cpus} if reserve else {"memory": 1}
    if resources.gpus:
        wanted["GPU"] = resources.gpus
    if resources.memory_gb:
        wanted["memory"] = int(resources.memory_gb * 2**30)
    return ray.train.ScalingConfig(
        num_workers=resources.workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker=wanted,
        accelerator_type=resources.accelerator_type,
    )


def _serve(arguments: dict[str, Any]) -> None:
    """A worker: one job after another, until the mailbox is closed. One that starts again finds the job it was at."""
    import ray
    import ray.train
    import torch
    from ray import cloudpickle

    mailbox, first, done = arguments["mailbox"], ray.train.get_context().get_world_rank() == 0, 0
    while True:
        number, job, closed = ray.get(mailbox.take.remote(done))
        if job is not None:
            given, cpus = cloudpickle.loads(job)
            mistake = _mistake(given, cpus, lambda content: ray.get(mailbox.report.remote(content)))
            done = number
            gc.collect()  # a module and its engine hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if first:
                ray.get(mailbox.finish.remote(mistake))
        elif closed:
            return
        else:
            time.sleep(POLL)


def _mistake(job: Job, cpus: float, report: Callable[[Any], None]) -> UserError | None:
    """Do a job. A user's mistake, raised, would make Ray Train start over."""
    from cluster.devices import limit_threads

    limit_threads(cpus)
    try:
        job(report)
    except UserError as error:
        return error
    return None
