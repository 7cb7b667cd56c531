"""Texts and configs without the secrets of the URIs in them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

DATABASES = ("postgresql", "mysql", "mariadb", "mssql", "oracle")  # their passwords may have slashes
NAMED = (*DATABASES, "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")  # their user belongs to the address, and is no secret
SECRET = re.compile(
    r"passw|pwd|secret|token|signature|credential|^(sig|auth|key|session)$|(api|access|account)[_-]?key|odbc_connect",
    re.IGNORECASE,
)

# of a URI, behind its scheme: a port that is no number is a password, which a blank or a slash does not end
ODD_PASSWORD = re.compile(r"[^\s/?#@:\[]*:(?!\d*[^\w\s]*(?:[\s/?#]|$))\S[^@\n]{,200}@")
# user:password@host without a scheme; no path, no address of mail, no digest of an image
LOGIN = re.compile(
    r"(?<![\w.%+~@:/\\-])(?!mailto:)[\w.%+~-]{1,100}:[^\s@/\\'\"<>:][^\s/\\]{,200}@(?!sha\d+:)(?=[^\W\d_]|\d+\.\d+\.\d|\[)",
    re.IGNORECASE,
)
BLANK = "\ue000"  # of no alphabet


def without_user(text: str) -> str:
    """A text that can be shown and kept: its URIs without passwords, also those of a query, and the users that go with them.

    What reads `user:password@host` is taken for a URI that lacks its scheme.
    """
    parts = text.split("://")
    schemes = [re.split(r"[^\w+]", part[-20:])[-1] for part in parts]
    return LOGIN.sub("", "://".join([parts[0], *map(_without_secrets, schemes, parts[1:])]))


def _without_secrets(scheme: str, text: str) -> str:
    """`text` goes on after the `://` of a URI."""
    name, odd = scheme.lower().partition("+")[0], ODD_PASSWORD.match(text)
    begun = odd.end() if odd else 0
    uri = text[:begun] + re.split(r"\s", text[begun:], maxsplit=1)[0]
    rest = text[len(uri) :]
    authority = uri[:begun] + re.split("[/?#]", uri[begun:], maxsplit=1)[0]
    end = max(authority.rfind("@"), uri.find("@") if name in DATABASES else -1)
    user = re.split("[:@]", uri[: end + 1], maxsplit=1)[0] if name in NAMED else ""
    place, *fields = re.split("([?&;#])", uri[end + 1 :])
    return "".join([user, "@" if user else "", place, *_open_fields(fields), rest])


def _open_fields(fields: Sequence[str]) -> Iterator[str]:
    """Of marks and the fields behind them those that hold no secret; the mark of one left out is the next one's."""
    left = ""
    for mark, field in zip(fields[::2], fields[1::2], strict=True):
        name, given, _ = field.partition("=")
        mark = left if left and mark == "&" else mark
        left = mark if given and SECRET.search(name[:100]) else ""
        if not left:
            yield mark + field


def hidden(node: Any) -> Any:
    """A config's content as it is kept: every text in it as `without_user` gives it; a URI among them may have blanks."""
    if isinstance(node, dict):
        return {name: hidden(value) for name, value in node.items()}
    if isinstance(node, list):
        return [hidden(value) for value in node]
    if isinstance(node, str) and re.match(r"[\w+]+://", node):
        return without_user(node.replace(" ", BLANK)).replace(BLANK, " ")
    return without_user(node) if isinstance(node, str) else node
