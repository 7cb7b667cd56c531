"""What a running stage tells its driver: progress and metrics."""


class Monitor:
    """Receives a stage's progress, and drops it; the driver's draw it and record it."""

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """A stage of `total` units begins, `done` of them finished by an earlier run."""

    def advance(self, count: int, seconds: float = 0.0) -> None:
        """`count` more units are finished, at which a process has worked so long."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Training metrics at an optimiser step."""


class Several(Monitor):
    """Tells all of some monitors."""

    def __init__(self, *monitors: Monitor) -> None:
        self.monitors = monitors

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """As `Monitor`."""
        for monitor in self.monitors:
            monitor.start(total, unit, done)

    def advance(self, count: int, seconds: float = 0.0) -> None:
        """As `Monitor`."""
        for monitor in self.monitors:
            monitor.advance(count, seconds)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """As `Monitor`."""
        for monitor in self.monitors:
            monitor.metrics(step, values)
