"""What Ray runs in Python's place: asks the fork server (forkserver.py) for a worker, and ends. All else is left to Python.

Run by its path, without site packages and with as few modules as it needs: it stands before every worker.
"""

import json
import os
import socket
import sys

WORKER, SETUP = "default_worker.py", "setup_worker.py"  # Ray's programs: the second puts an environment around the first
LANGUAGE, ENVIRONMENT = "--language=", "--serialized-runtime-env-context="  # arguments of the second


def main(python: str, address: str, arguments: list[str]) -> None:
    """Where no server answers, Python begins as it would have without one."""
    worker = as_worker(python, arguments)
    if worker is not None:
        arguments_of_worker, variables = worker
        environment = {**os.environ, **variables}
        request = json.dumps({"arguments": arguments_of_worker, "environment": environment, "folder": os.getcwd()}).encode()
        with socket.socket(socket.AF_UNIX) as server:
            try:
                server.connect(address)
                sent = socket.send_fds(server, [request], [0, 1, 2])
                return server.sendall(request[sent:])
            except OSError:
                pass
    os.execv(python, [python, *arguments])


def as_worker(python: str, arguments: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """(Arguments of Ray's worker, variables of its own). None of what is not one, or has an environment to be made.

    Ray Train gives its workers variables of Ray's, which are read when they are needed; what libraries read when they are
    loaded would come too late for a fork.
    """
    variables: dict[str, str] = {}
    if os.path.basename(arguments[0]) == SETUP:
        given = next((each for each in arguments if each.startswith(ENVIRONMENT)), f"{ENVIRONMENT}{{}}")
        context = json.loads(given.removeprefix(ENVIRONMENT))
        variables = context.pop("env_vars", {})
        if any(value not in (None, [], {}, python) for value in context.values()):
            return None
        arguments = [each for each in arguments[1:] if not each.startswith((LANGUAGE, ENVIRONMENT))]
    alike = all(name.startswith("RAY_") for name in variables)
    return (arguments, variables) if alike and os.path.basename(arguments[0]) == WORKER else None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
