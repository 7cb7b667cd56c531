"""What commands print is shown as it is."""

import pytest
from rich.table import Table

from cluster.driver.progress import answers, console

FOREIGN = "[/tmp/x] [abc] :car:"


def test_brackets_of_paths_and_messages_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("message", title=FOREIGN)
    table.add_row(f"row {FOREIGN}")
    answers.print(table)
    console.print(FOREIGN)
    shown = capsys.readouterr()
    assert f"row {FOREIGN}" in shown.out
    assert shown.out.count(FOREIGN) == 2
    assert shown.err == f"{FOREIGN}\n"
