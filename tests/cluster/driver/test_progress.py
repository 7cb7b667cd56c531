"""What commands print is shown as it is, and gives the terminal no orders; progress ends whole."""

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.tree import Tree

from cluster.driver import progress
from cluster.driver.progress import StageProgress, answers, console, printable

FOREIGN = "[/tmp/x] [abc] :car:"
ORDERS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r", "\x08", "\x7f", "\x00", "\u202e", "\u2066", "\u2028", "\udcff"]


def test_brackets_of_paths_and_messages_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("message", title=FOREIGN)
    table.add_row(f"row {FOREIGN}")
    answers.print(table)
    console.print(FOREIGN)
    shown = capsys.readouterr()
    assert f"row {FOREIGN}" in shown.out
    assert shown.out.count(FOREIGN) == 2
    assert shown.err == f"{FOREIGN}\n"


@pytest.mark.parametrize("order", ORDERS)
def test_names_give_the_terminal_no_orders(order: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"before{order}after"
    table = Table(name, title=name)
    table.add_row(name)
    tree = Tree(name)
    tree.add(name)
    for terminal in (answers, console):
        terminal.print(table)
        terminal.print(tree)
        terminal.print(name, style="red")
        terminal.print(f"error: {name}")
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert text.isprintable() or printable(text) == text
        assert order not in text
        assert text.count("before") == text.count("after") == 7


def test_what_is_no_order_stays() -> None:
    for text in ("a\tb\nc", "Größe 大 👩\u200d🔬", "שלום\u200f", ""):
        assert printable(text) == text


def test_passwords_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    answers.print("s3://key:secret@bucket/x")
    console.print("error: postgresql://me:secret@host/db", style="red")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("s3://bucket/x\n", "error: postgresql://me@host/db\n")


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_estimates_leave_the_start_up_out_and_the_end_is_whole(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("embed:x", Progress(disable=True)) as stage:
        stage.start(150, "image", 50)
        clock.now += 100  # a model is loaded
        stage.advance(4)
        clock.now += 1  # a second actor's first
        stage.advance(4)
        assert lines(capsys) == ["  embed:x: 54 of 150 images"]
        for _ in range(8):
            clock.now += 10
            stage.advance(10)
    shown = lines(capsys)
    assert shown[0] == "  embed:x: 78 of 150 images, 1.0/s, 72 s left"
    assert shown[-1] == "  embed:x: 150 of 150 images"


def test_what_fails_does_not_end_whole(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with StageProgress("embed:x", Progress(disable=True)) as stage:
            stage.start(10, "image")
            clock.now += 100
            stage.advance(4)
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        work()
    assert lines(capsys) == ["  embed:x: 4 of 10 images"]


def test_more_than_all_is_all(clock: Clock) -> None:
    with StageProgress("embed:x", Progress(disable=True)) as stage:
        stage.start(10, "image")
        stage.advance(14)
        assert stage.done == 10
