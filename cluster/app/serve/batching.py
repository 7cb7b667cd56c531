"""Work that several threads ask for at about the same time, done as one batch."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

from cluster.app.serve.child import Ended

MOST = 16  # of a batch
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Batching(Generic[Asked, Answer]):
    """`work`, which answers a list, for single calls: those that come while the worker is busy are its next batch.

    Nobody waits for others to come.
    """

    def __init__(self, work: Callable[[list[Asked]], Iterable[Answer]], worker: Executor) -> None:
        """`worker`: one thread."""
        self._work, self._worker = work, worker
        self._waiting: deque[tuple[Asked, Future[Answer]]] = deque()

    def __call__(self, asked: Asked) -> Answer:
        """Raises what `work` raises of this one."""
        future: Future[Answer] = Future()
        self._waiting.append((asked, future))
        self._worker.submit(self._next)  # finds nothing where an earlier turn took this one too
        return future.result()

    def _next(self) -> None:
        if self._waiting:
            self._answer([self._waiting.popleft() for _ in range(min(len(self._waiting), MOST))])

    def _answer(self, batch: list[tuple[Asked, "Future[Answer]"]]) -> None:
        try:
            answers = self._work([asked for asked, _ in batch])
        except Exception as error:
            if len(batch) == 1 or isinstance(error, Ended):  # else each would load the models again
                for _, future in batch:
                    future.set_exception(error)
                return
            for one in batch:
                self._answer([one])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            future.set_result(answer)
