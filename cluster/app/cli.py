"""The command `vdg`: a file of `commands/` for each thing that a person does."""

import typer

from cluster.app.commands import config, doctor, jobs, lineage, outputs, run, search, sweep, weights
from cluster.driver import session
from cluster.driver.failures import explained
from cluster.driver.interrupt import end_as_ctrl_c
from cluster.driver.progress import console
from cluster.ending import end_at_once
from cluster.errors import UserError

LONGEST = 20_000  # characters of a message: a file's text may be in it
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The command `vdg`.")
app.callback()(config.common)
for part in (run, config, search, outputs, sweep, lineage, jobs, weights, doctor):
    app.add_typer(part.app)


def main() -> None:
    """A user's mistake, or a disk or store that fails, is one message on standard error and exit status 2."""
    end_as_ctrl_c()
    try:
        explained(app.__call__)()
    except UserError as error:
        console.print(f"error: {error}"[:LONGEST], style="red")
        session.end(2)


def program() -> None:
    """Entry point."""
    end_at_once(main)
