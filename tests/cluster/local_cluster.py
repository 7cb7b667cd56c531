"""A Ray cluster of several nodes on this machine, with a token, in a process of its own that ends with its standard input.

Run as a program it starts the nodes and prints the addresses; nothing of another Ray on the machine is touched.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
STORE = 200 * 2**20  # bytes of each node's object store


@dataclass(frozen=True)
class LocalCluster:
    """Addresses of a running cluster, and the environment of the commands that use it."""

    gcs: str
    dashboard: str
    environment: dict[str, str]

    def vdg(self, *arguments: str, status: int = 0) -> tuple[str, str]:
        """Run `vdg` as a user of the cluster. Returns what it printed on standard output and on standard error."""
        command = [sys.executable, "-m", "cluster.app", *arguments, "--address", self.dashboard]
        environment = {**self.environment, "PYTHONPATH": str(PROJECT)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout, result.stderr


@contextmanager
def local_cluster(workers: int, cpus: int) -> Iterator[LocalCluster]:
    """A head without CPUs and `workers` nodes of `cpus` CPUs each."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the jobs' `python`
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "PYTHONPATH")
    }
    often = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}  # tiny trainings end within MLflow's ten seconds
    # the nodes get our packages from the jobs alone
    environment = {**inherited, **token, **often, "PATH": path, "COLUMNS": "200"}
    command = [sys.executable, __file__, str(workers), str(cpus)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.startswith("{"))
            yield LocalCluster(**json.loads(line), environment=environment)
        finally:
            process.stdin.close()
            process.wait(120)


def _serve(workers: int, cpus: int) -> None:
    from ray.cluster_utils import Cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {
        "num_cpus": 0,
        "object_store_memory": STORE,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
        "dashboard_agent_listen_port": None,  # a free one: another Ray of this machine may have the usual one
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(workers):  # in one folder the nodes unpack a job's files over each other
            cluster.add_node(num_cpus=cpus, object_store_memory=STORE, temp_dir=f"{folder}/{number}")
        dashboard = f"http://{cluster.webui_url}"
        _wait_for_jobs(dashboard)
        print(json.dumps({"gcs": cluster.address, "dashboard": dashboard}), flush=True)
        sys.stdin.read()
        cluster.shutdown()


def _wait_for_jobs(dashboard: str) -> None:
    """The head takes jobs once its agent is up, some time after the dashboard."""
    from ray.job_submission import JobSubmissionClient

    client, until = JobSubmissionClient(dashboard), time.monotonic() + 180
    while True:
        try:
            client.submit_job(entrypoint="true")
            return
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
