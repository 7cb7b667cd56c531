"""A service without Ray: uvicorn on a socket that is bound here."""

import ipaddress
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from cluster.app.api import Run
from cluster.app.serve.app import Uploads, make_app
from cluster.driver.progress import console
from cluster.errors import UserError

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
TOKEN_CHARACTERS = 16


def read_token(host: str, file: Path | None) -> str | None:
    """The token. Raises UserError when there is none and others than this machine's users could connect."""
    if file is None:
        if host not in LOOPBACK:
            raise UserError(f"--host {host}: other machines could connect; give --token-file, or leave --host out")
        return None
    try:
        token = file.read_text().strip()
    except OSError as error:
        raise UserError(f"--token-file {file}: cannot be read ({error.strerror})") from error
    if len(token) < TOKEN_CHARACTERS or not token.isascii() or not token.isalnum():
        raise UserError(f"--token-file {file}: needs one word of at least {TOKEN_CHARACTERS} letters and digits")
    return token


def local_app(
    run: Run, models: list[str], names: list[str], token: str | None, author: str, uploads: Uploads | None = None
) -> FastAPI:
    """The app for requests to this machine, by its own names and these."""
    hosts = {*LOOPBACK, socket.gethostname().lower(), socket.getfqdn().lower(), *(name.lower() for name in names)}
    return make_app(run, models, hosts, token, author, uploads)


def address_url(host: str, port: int, token: str | None) -> str:
    """Where a browser goes."""
    place = f"[{host}]" if ":" in host else host
    return f"http://{place}:{port}/{'?token=...' if token else ''}"


def serve_forever(app: FastAPI, host: str, port: int, token: str | None) -> None:
    """Answer until Ctrl-C."""
    bound = bind(host, port, token)
    console.print(f"ready at {address_url(host, port, token)}; Ctrl-C ends")
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)).run(sockets=[bound])


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A listening socket. Raises UserError when the port is taken, or the socket is open to others without a token."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be bound ({error.strerror}); give another") from error
    address = bound.getsockname()[0]
    if token is None and not ipaddress.ip_address(address).is_loopback:
        bound.close()
        raise UserError(f"--host {host}: is bound to {address}, which is no loopback address")
    return bound
