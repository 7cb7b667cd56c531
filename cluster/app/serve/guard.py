"""What every request passes: allowed hosts, the token, limits of size and load, and the headers of every answer."""

import json
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import cookie_parser

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "vdg_token"
OPEN = {"/healthz", "/readyz"}  # say nothing of the run
BODY_BYTES = 64 * 1024  # of a request that is no image
UPLOAD_BYTES = 10 * 2**20  # of one that is
AT_A_TIME = 32  # requests in flight; further ones are sent away
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware. There are no CORS headers: other origins' pages read nothing, and start nothing."""

    def __init__(self, app: App, hosts: Collection[str], token: str | None) -> None:
        self.app, self.hosts, self.token = app, hosts, token
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused; pass on the rest."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
        secure = _with_headers(send)
        if scope["path"] == "/" and self.token and self._is_token(_asked(scope)):
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            await _answer(secure, 303, "see /", {"location": "/", "set-cookie": cookie})
        elif refused := self._refused(scope, headers):
            await _answer(secure, *refused)
        elif self.in_flight >= AT_A_TIME and scope["path"] not in OPEN:
            await _answer(secure, 503, "too many requests at a time; try again", {"retry-after": "1"})
        else:
            self.in_flight += 1
            try:
                await self.app(scope, receive, secure)
            finally:
                self.in_flight -= 1

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason, where a request goes no further."""
        if _name(headers.get("host", "")) not in self.hosts:
            return 421, "this host name is not served here"
        if self.token and scope["path"] not in OPEN and not self._is_token(_given(headers)):
            return 401, "a token is needed: open /?token=..., or send Authorization: Bearer ..."
        if scope["method"] in ("POST", "PUT", "DELETE") and headers.get("sec-fetch-site", "none") not in (
            "none",
            "same-origin",
        ):
            return 403, "another origin's page sent this"
        if scope["method"] == "POST" and not headers.get("content-length", "").isdigit():
            return 411, "Content-Length is needed"
        if scope["method"] == "POST" and int(headers["content-length"]) > BODY_BYTES:
            return 413, f"the body is larger than {BODY_BYTES} bytes"
        return None

    def _is_token(self, given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), (self.token or "").encode())


def _asked(scope: Scope) -> str | None:
    return parse_qs(scope["query_string"].decode("latin1")).get("token", [None])[0]


def _given(headers: dict[str, str]) -> str | None:
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value
    return cookie_parser(headers.get("cookie", "")).get(COOKIE)  # lenient: other servers on this host set cookies too


def _name(host: str) -> str:
    """A Host header without its port."""
    return host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0].lower()


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *((n.encode(), v.encode()) for n, v in HEADERS.items())]
        await send(message)

    return sending


async def _answer(send: Send, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
    sent = {"content-type": "application/json", **(headers or {})}
    lines = [(name.encode(), value.encode()) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})
