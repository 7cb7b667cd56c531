"""The terminal: a command's answer, and the progress of a driver's stages: a bar with rate and expected end, or plain lines."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# what they print is foreign: a path may have brackets, which are no markup
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)  # progress and messages
# what a command is asked for; nothing is cut where it goes into a pipe or a file
answers = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=None if sys.stdout.isatty() else 1000)
LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class RunProgress:
    """The terminal of a run: a bar for each stage at work. A context manager."""

    def __init__(self) -> None:
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:32}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> "RunProgress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


class StageProgress:
    """The monitor of one running stage: its bar, while the block runs."""

    def __init__(self, instance: str, bars: Progress) -> None:
        self.instance = instance
        self.total, self.done, self.unit = 0, 0, ""
        self._began = self._printed = time.monotonic()
        self._here = 0  # units done by this process
        self._bar = bars
        self._task = bars.add_task(instance, total=None, rate="")

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.remove_task(self._task)

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """The stage has `total` units, of which an earlier run finished `done`."""
        self.total, self.unit, self.done = total, unit, done
        self._began = time.monotonic()
        self._bar.update(self._task, total=total, completed=done)

    def advance(self, count: int) -> None:
        """`count` more units are finished."""
        self.done += count
        self._here += count
        rate = self._here / max(time.monotonic() - self._began, 1e-6)
        self._bar.update(self._task, completed=self.done, rate=f"{rate:.1f} {self.unit}s/s")
        if not console.is_terminal and time.monotonic() - self._printed > LINE_EVERY:
            self._printed = time.monotonic()
            left = (self.total - self.done) / max(rate, 1e-6)
            console.print(f"  {self.instance}: {self.done:,} of {self.total:,} {self.unit}s, {rate:.1f}/s, {left:.0f} s left")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The bar shows the loss."""
        if "loss" in values:
            self._bar.update(self._task, description=f"{self.instance} loss {values['loss']:.3f}")
