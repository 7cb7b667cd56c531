"""One Ray session for each process of the suite, a few real photos, and tiny models."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.driver import session
from cluster.driver.mlflow_store import connect, sqlite_uri

PHOTOS = Path(__file__).parent / "data" / "grocery"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and two processes test at a time


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of a file are one process's, and all of the app's: they share a run that takes a minute to make."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "app" if nodeid.startswith("tests/cluster/app/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with four logical CPUs, whatever the machine has."""
    import ray

    session.start(session.RayConfig(num_cpus=4), tmp_path_factory.mktemp("logs") / "log.txt")
    session._begun.clear()  # a command of a test that fails does not end the suite
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's store before the first run, of which it takes seconds to make one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(sqlite_uri(path))
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Path:
    """An empty store, `mlflow.db` in the test's folder."""
    return Path(shutil.copy(empty_store, tmp_path))


@pytest.fixture(scope="session")
def photos() -> list[tuple[str, bytes]]:
    """(key, JPEG bytes) of the first 64 training photos."""
    table = pq.read_table(PHOTOS / "train" / "part-00000.parquet").slice(0, 64)
    return list(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))


@pytest.fixture
def photo_folder(tmp_path: Path, photos: list[tuple[str, bytes]]) -> Path:
    """A folder of 24 real photos as JPEG files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for key, content in photos[:24]:
        (folder / f"{key}.jpg").write_bytes(content)
    return folder


class Recorder:
    """A monitor that keeps what a stage reports."""

    def __init__(self) -> None:
        self.total, self.resumed, self.advanced, self.seconds = 0, 0, 0, 0.0
        self.reports: list[tuple[int, dict[str, float]]] = []

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.total, self.resumed = total, done

    def advance(self, count: int, seconds: float = 0.0) -> None:
        self.advanced += count
        self.seconds += seconds

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.reports.append((step, values))


@pytest.fixture
def monitor() -> Recorder:
    """A fresh recording monitor."""
    return Recorder()


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights of a tiny Llama."""
    from tests import tiny

    return tiny.language_model(tmp_path_factory.mktemp("language_model"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny text tower, as a config section."""
    from tests import tiny

    return tiny.text_tower(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An open_clip tower of width 16 with a checkpoint, as a config section."""
    import json

    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    shape: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    Path(folder / "tiny-clip.json").write_text(json.dumps(shape))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "clip.pt")
    return {"library": "open_clip", "model": "tiny-clip", "weights": {"folder": str(folder), "file": "clip.pt"}}


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tower's config of a tiny BLIP retrieval model."""
    from mining.config import TowerConfig
    from tests import tiny

    return TowerConfig(**tiny.blip(tmp_path_factory.mktemp("blip")))


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny image tower's config."""
    from mining.config import TowerConfig
    from tests import tiny

    return TowerConfig(**tiny.image_tower(tmp_path_factory.mktemp("tower")))
