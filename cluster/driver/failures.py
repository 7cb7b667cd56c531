"""A full disk, a store out of reach or a user's mistake, said as a user's error behind whatever the libraries made of it.

How often lost workers are replaced: `max_failures` of `cluster/config.py`.
"""

import errno
import os
import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from cluster.errors import UserError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "unexpected pos")  # the last is torch.save's way to say it
UNREACHABLE = (
    *(os.strerror(number) for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EROFS, errno.EACCES)),
    "AWS Error",
    "google::cloud::Status",
    "dlopen(",  # of HDFS's library
)
MISTAKE = re.compile(r"^cluster\.errors\.UserError: (.+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)  # ends a traceback
RESUME = "the same command then goes on from what is finished"


def explained(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make the failures of disks and stores in `work`, and users' mistakes that workers found, UserErrors.

    They are told by their text: Ray, DeepSpeed and safetensors wrap a worker's exception in ones of their own, of which the
    traceback's last line is all that is left.
    """

    @wraps(work)
    def attempt(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """`work`, its failures said."""
        try:
            return work(*args, **kwargs)
        except Exception as error:
            said = _said(error)
            if said is None or said is error:
                raise
            raise said from error

    return attempt


def _said(error: Exception) -> UserError | None:
    from ray.exceptions import RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error  # of a task: both a RayTaskError and a UserError
    if isinstance(cause, UserError):
        return cause
    if mistake := MISTAKE.search(str(error)):
        return UserError(mistake[1])
    for line in reversed(f"{type(error).__name__}: {error}".splitlines()):
        if any(symptom in line for symptom in FULL):
            return UserError(f"a disk is full: {line.strip()}\nmake room (`vdg clean` removes unused outputs); {RESUME}")
        if any(symptom in line for symptom in UNREACHABLE):
            return UserError(f"a store cannot be used: {line.strip()}\nsee that it can be reached and written; {RESUME}")
    return None
