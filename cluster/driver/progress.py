"""The terminal: a command's answer, and the progress of a driver's stages: a bar with rate and expected end, or plain lines."""

import re
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from cluster.monitor import Monitor
from cluster.redaction import without_user

# what a terminal obeys rather than shows, but line feeds and tabs; marks that turn the order of a text; what is not UTF-8
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_EVERY = 15.0  # seconds between lines where there is no terminal
WAVE = 0.05  # of the time to the first unit, in which the other actors' first ones come


def printable(text: str) -> str:
    """A text whose control characters are pictures of them, each one column wide."""
    return CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\N{REPLACEMENT CHARACTER}", text)


class Terminal(Console):
    """Shows foreign texts: brackets of a path are no markup, names give the terminal no orders, passwords stay hidden."""

    def __init__(self, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """A plain text, before its width is measured."""
        return super().render_str(printable(without_user(text)), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever is printed, piece by piece."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


console = Terminal(stderr=True)  # progress and messages
# what a command is asked for; nothing is cut where it goes into a pipe or a file
answers = Terminal(width=None if sys.stdout.isatty() else 1000)


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
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> "RunProgress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


class StageProgress(Monitor):
    """The monitor of one running stage: its bar, while the block runs. One that ends well ends whole."""

    def __init__(self, instance: str, bars: Progress) -> None:
        self.instance = instance
        self.total, self.done, self.unit = 0, 0, ""
        self._began = self._printed = time.monotonic()
        self._first: float | None = None  # when the first unit of this process was done
        self._base = 0.0, 0  # when the first wave was done, and what was done then: the rate leaves the start-up out
        self._said = False
        self._bar = bars
        self._task = bars.add_task(instance, total=None, rate="", left="")

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.done < self.total:
            self.done = self.total
            self._bar.update(self._task, completed=self.total, left="", refresh=True)
        if kind is None and self._said:
            console.print(f"  {self.instance}: {self.done:,} of {self.total:,} {self.unit}s")
        self._bar.remove_task(self._task)

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """The stage has `total` units, of which an earlier run finished `done`."""
        self.total, self.unit, self.done = total, unit, done
        self._began, self._first = time.monotonic(), None
        self._bar.update(self._task, total=total, completed=done)

    def advance(self, count: int, seconds: float = 0.0) -> None:
        """`count` more units are finished."""
        now = time.monotonic()
        self.done = min(self.done + count, self.total)
        self._first = self._first or now
        if now - self._first <= WAVE * (self._first - self._began):
            self._base = now, self.done
        at, before = self._base
        rate = (self.done - before) / (now - at) if self.done > before and now > at else 0.0
        left = (self.total - self.done) / rate if rate else 0.0
        speed, remaining = (f"{rate:.1f} {self.unit}s/s", str(timedelta(seconds=round(left)))) if rate else ("", "")
        self._bar.update(self._task, completed=self.done, rate=speed, left=remaining)
        if not console.is_terminal and now - self._printed > LINE_EVERY and self.done < self.total:
            self._printed, self._said = now, True
            estimate = f", {rate:.1f}/s, {left:.0f} s left" if rate else ""
            console.print(f"  {self.instance}: {self.done:,} of {self.total:,} {self.unit}s{estimate}")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The bar shows the loss."""
        if "loss" in values:
            self._bar.update(self._task, description=f"{self.instance} loss {values['loss']:.3f}")
