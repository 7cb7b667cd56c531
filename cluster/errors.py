"""The one exception that is shown to users without a traceback, and how a text is shown in it."""


class UserError(Exception):
    """A mistake in the config, the input or the environment that the user can mend.

    The message names the field, file or row, what was found, and what to do.
    """


def shown(text: str) -> str:
    """A text as UTF-8 can say it: what is not is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
