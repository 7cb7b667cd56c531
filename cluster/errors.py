"""The exception that is shown to users without a traceback, that of a row that is rejected, and how a text is shown in them."""


class UserError(Exception):
    """A mistake in the config, the input or the environment that the user can mend.

    The message names the field, file or row, what was found, and what to do.
    """


class Rejected(Exception):
    """An image or a row that is not taken: a short reason, which is counted, and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def shown(text: str) -> str:
    """A text as UTF-8 can say it: what is not is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
