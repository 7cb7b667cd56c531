"""The service on Ray Serve: replicas that each hold the models, and uploads that they share."""

import ipaddress
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from cir.search import Reference
from cluster.app import config as configs
from cluster.app.api import Run
from cluster.app.config import RunConfig
from cluster.app.graph import Graph
from cluster.app.serve.app import Uploads
from cluster.app.serve.guard import AT_A_TIME
from cluster.app.serve.local import LOOPBACK, address_url, local_app, read_token
from cluster.config import Section
from cluster.driver import session
from cluster.driver.demand import lacking, nodes
from cluster.driver.progress import console
from cluster.errors import UserError

NAME = "visual-delta"  # of the application: another one of this name takes its place
QUEUED = 100  # requests that wait where every replica has as many as it takes; further ones get 503
HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"


class Options(Section):
    """What is served, and to whom."""

    models: str | None = Field(
        None, description="such as supervised.s0,semi.s0; None: the recommended one and the first of every other variant"
    )
    token_file: Path | None = Field(None, description="a file on every node, whose content clients have to give")
    names: list[str] = Field([], description="host names that clients call it by")
    author: str = Field("unknown", description="whose labels are kept")


class Arguments(Options):
    """What a cluster's `serveConfigV2` gives. There others can always connect: a token is needed."""

    token_file: Path = Field(description="a file on every node, whose content clients have to give")
    config: str = Field(description="a YAML file that every node sees, or a preset's name")
    set: list[str] = Field([], description="section.field=value, put over the config")


def app(arguments: Arguments) -> serve.Application:
    """The application, as `import_path: cluster.app.serve.ray:app` names it."""
    options = Options.model_validate(arguments.model_dump(include=set(Options.model_fields)))
    return application(configs.load(arguments.config, arguments.set), options)


def application(config: RunConfig, options: Options) -> serve.Application:
    """A run's models on as many replicas as `resources.serve` says. Raises UserError."""
    run, resources = Run(Graph(config)), config.resources.serve
    models = run.served(options.models)
    console.print(f"{len(models)} models over {len(run.thumbnails):,} images")  # thumbnails are made here, once
    digest = run.graph.evaluation.digest  # a replica that starts again serves what the others do
    deployment: Any = serve.deployment(serve.ingress(_builder(config, digest, models, options))())
    replica = deployment.options(
        name="Replica",
        num_replicas=resources.actors,
        ray_actor_options={name: value for name, value in resources.ray_options().items() if value is not None},
        max_ongoing_requests=2 * AT_A_TIME,  # the app sends away what is too much by itself, and says when to come again
        max_queued_requests=QUEUED,
        backpressure_config={"retry_after_s": 1},
        max_surge_percent=1,  # one new replica at a time, before an old one goes
        graceful_shutdown_timeout_s=60,
    )
    kept: Any = Kept
    return cast(serve.Application, replica.bind(kept.bind()))


def _builder(config: RunConfig, digest: str, models: list[str], options: Options) -> Callable[[], FastAPI]:
    """What a replica calls once, in its event loop."""

    def build() -> FastAPI:
        graph = Graph(config)
        graph.evaluation.recall(config.root, digest)
        run = Run(graph)
        token = None if options.token_file is None else read_token("", options.token_file)
        return local_app(run, models, options.names, token, options.author, Shared(serve.get_deployment_handle("Kept"), digest))

    return build


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_surge_percent=1)
class Kept(Uploads):
    """The uploads of all replicas: the one that searches may be another than the one that encoded."""


class Shared(Uploads):
    """The uploads as a replica asks for them; those of another run's tower are not among them."""

    def __init__(self, kept: DeploymentHandle, digest: str) -> None:
        self.kept, self.digest = kept, digest

    def keep(self, name: str, reference: Reference) -> None:
        """Returns when every replica finds it."""
        self.kept.keep.remote(f"{self.digest}/{name}", reference).result()

    def get(self, name: str) -> Reference | None:
        """None where it is not, or no longer, known."""
        found: Reference | None = self.kept.get.remote(f"{self.digest}/{name}").result()
        return found


def serve_on_ray(config: RunConfig, options: Options, host: str, port: int) -> None:
    """Deploy; on a Ray that starts here, until Ctrl-C. Raises UserError before anything starts when others could connect."""
    token = read_token(host, options.token_file)
    check_proxy(host)
    session.start(config.resources.ray)
    local = config.resources.ray.where == "local"
    if local:
        check_room(config)
    try:
        deploy(config, options, host, port)
        if token is None:
            check_bound(host, port)
        console.print(f"ready at {address_url(host, port, token)}")
        if local:
            console.print("Ctrl-C ends")
            threading.Event().wait()
    except (KeyboardInterrupt, SystemExit):
        serve.shutdown()
    except UserError:
        serve.shutdown()
        raise


def deploy(config: RunConfig, options: Options, host: str, port: int) -> None:
    """Start the application, or put it in the place of the one of its name: requests find the old one until then."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    serve.run(application(config, options), name=NAME, route_prefix="/")


def check_proxy(host: str) -> None:
    """Raises UserError when Ray Serve would bind every address of this machine, whatever it is told."""
    if host in LOOPBACK and os.environ.get(HA_PROXY) == "1":
        raise UserError(
            f"{HA_PROXY}=1 binds every address of this machine, whatever --host {host} says: unset it, or give --token-file"
        )


def check_room(config: RunConfig) -> None:
    """Raises UserError when this machine has no room for the replicas, for which Ray Serve would wait."""
    wanted = {"resources.serve": config.resources.serve.processes()}
    for field, problem in lacking(wanted, nodes(config.resources.ray) or []).items():
        raise UserError(f"{field}: {problem}")


def check_bound(host: str, port: int) -> None:
    """Raises UserError when a socket that listens on the port takes others than this machine's users."""
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
    for address in listening:
        if not ipaddress.ip_address(address.ip).is_loopback:
            raise UserError(f"--host {host}: Ray Serve has bound {address.ip}, which is no loopback address; it was ended")
