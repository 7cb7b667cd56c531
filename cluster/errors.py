"""The one exception that is shown to users without a traceback."""


class UserError(Exception):
    """A mistake in the config, the input or the environment that the user can mend.

    The message names the field, file or row, what was found, and what to do.
    """
