"""What a running stage tells its driver: progress and metrics."""

from typing import Protocol


class Monitor(Protocol):
    """Receives a stage's progress. The driver draws it and records it; tests may collect it."""

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """A stage of `total` units begins, `done` of them finished by an earlier run."""

    def advance(self, count: int) -> None:
        """`count` more units are finished."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Training metrics at an optimiser step."""


class Silent:
    """A monitor that drops everything."""

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """Dropped."""

    def advance(self, count: int) -> None:
        """Dropped."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Dropped."""
