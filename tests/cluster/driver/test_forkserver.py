"""Workers are forks that stand for themselves, and plain processes wherever they cannot be."""

import atexit
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.driver import fork_client, forkserver

PATIENCE = 120.0
SETUP = ["/ray/setup_worker.py", "/ray/default_worker.py", "--worker-id=1", "--language=PYTHON"]
PLAIN = {"command_prefix": [], "env_vars": {}, "py_executable": "python", "override_worker_entrypoint": None}


class Witness:
    """What an actor finds in its process before it imports anything."""

    def tell(self) -> dict[str, Any]:
        from ray import ObjectID

        loaded = {"torch", "transformers", "peft", "deepspeed"} <= set(sys.modules)
        drawn = ObjectID.from_random().hex()
        return {"parent": os.getppid(), "loaded": loaded, "drawn": drawn, "group": os.getpgid(0) == os.getpid()}


@pytest.mark.usefixtures("ray_session")
def test_actors_are_forks_and_draw_ids_of_their_own() -> None:
    import ray

    actor: Any = ray.remote(Witness)
    actors = [actor.options(num_cpus=0).remote() for _ in range(3)]
    told = ray.get([each.tell.remote() for each in actors])
    assert {each["parent"] for each in told} == {forkserver._servers[0].pid}
    assert all(each["loaded"] and each["group"] for each in told)
    assert len({each["drawn"] for each in told}) == 3


class Finalized:
    """Writes a file when Python ends."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __del__(self) -> None:
        self.file.touch()


class Leaver:
    """An actor that ends by itself."""

    def leave(self, folder: Path) -> None:
        from ray.actor import exit_actor

        sys.modules["kept"] = Finalized(folder / "finalized")  # type: ignore[assignment]
        atexit.register((folder / "ended").touch)
        exit_actor()


@pytest.mark.usefixtures("ray_session")
def test_a_fork_ends_without_a_look_at_all_that_was_loaded(tmp_path: Path) -> None:
    import ray

    actor: Any = ray.remote(Leaver)
    leaver = actor.options(num_cpus=0).remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(leaver.leave.remote(tmp_path))
    until = time.monotonic() + PATIENCE
    while not (tmp_path / "ended").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    assert [file.name for file in tmp_path.iterdir()] == ["ended"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "1"}}, {"RAY_TRAIN_ENABLE_PRINT_PATCH": "1"}),
        ({"env_vars": {"OMP_NUM_THREADS": "1"}}, None),
        ({"command_prefix": ["cd /somewhere &&"]}, None),
        ({"py_executable": "/another/python"}, None),
    ],
)
def test_a_worker_with_an_environment_to_be_made_is_no_fork(changed: dict[str, Any], expected: dict[str, str] | None) -> None:
    given = [*SETUP, fork_client.ENVIRONMENT + json.dumps({**PLAIN, **changed})]
    worker = None if expected is None else (["/ray/default_worker.py", "--worker-id=1"], expected)
    assert fork_client.as_worker("python", given) == worker


@pytest.mark.parametrize("arguments", [["-u", "/ray/log_monitor.py"], ["-c", "print(1)"]])
def test_other_programs_are_no_workers(arguments: list[str]) -> None:
    assert fork_client.as_worker("python", arguments) is None


def test_python_begins_where_no_server_answers(tmp_path: Path) -> None:
    script = tmp_path / "default_worker.py"
    script.write_text("import sys; print(sys.argv[1:], 'transformers' in sys.modules)")
    client = [sys.executable, "-IS", fork_client.__file__, sys.executable, str(tmp_path / "nobody"), str(script), "--one=1"]
    assert subprocess.run(client, capture_output=True, text=True, check=True).stdout == "['--one=1'] False\n"


def test_forks_that_cannot_be_told_apart_begin_anew(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import os, sys; print('numpy' in sys.modules, os.environ['GIVEN'], os.getcwd())")
    request = {"arguments": [str(script)], "environment": {"GIVEN": "it"}, "folder": str(tmp_path), "streams": []}
    program = f"from cluster.driver.forkserver import work; work({ {**request, 'distinct': False}!r})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found == f"False it {tmp_path}\n"


def test_a_server_ends_with_its_driver_and_leaves_nothing(tmp_path: Path) -> None:
    program = "from cluster.driver import forkserver as f; print(f.python(), f._servers[0].pid)"
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    python, server = said.split()
    until = time.monotonic() + PATIENCE
    while (Path(python).parent.exists() or Path(f"/proc/{server}").exists()) and time.monotonic() < until:
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{server}").exists()


def test_beside_a_gpu_workers_are_started_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "GPUS", (str(tmp_path),))
    assert forkserver.python.__wrapped__() == sys.executable


def test_without_a_folder_workers_are_started_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(forkserver, "_program", none)
    assert forkserver.python.__wrapped__() == sys.executable
