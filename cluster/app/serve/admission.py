"""A bound on work that takes much memory or processor time: what waits behind too much of it is sent away."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Semaphore

from fastapi import HTTPException


class Admission:
    """At most `at_a_time` threads inside, and `waiting` more before them."""

    def __init__(self, at_a_time: int, waiting: int) -> None:
        self._inside, self._room = Semaphore(at_a_time), Semaphore(at_a_time + waiting)

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a turn. Raises HTTPException 503 where too many wait already."""
        if not self._room.acquire(blocking=False):
            raise HTTPException(503, "too much of this at a time; try again", {"retry-after": "1"})
        try:
            with self._inside:
                yield
        finally:
            self._room.release()
