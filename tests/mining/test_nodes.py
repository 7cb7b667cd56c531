"""Mining on several nodes gives the tables of one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.artifacts import Output
from mining.config import TowerConfig
from tests.cluster.local_cluster import PROJECT, LocalCluster, local_cluster
from tests.mining.mining_on import OUTPUTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head without work and two nodes of two CPUs."""
    with local_cluster(workers=2, cpus=2) as found:
        yield found


def hashes(folder: Path) -> dict[str, dict[str, str]]:
    """Of every file of every output but the reports, which say how it was done."""
    outputs = {name: Output(str(folder / name)) for name in OUTPUTS}
    return {name: output.hashes(output.parts()) for name, output in outputs.items()}


def test_two_nodes_with_two_actors_each_give_the_tables_of_one(
    cluster: LocalCluster, tower: TowerConfig, photos: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for key, content in photos:
        (tmp_path / "photos" / f"{key}.jpg").write_bytes(content)
    found, nodes = {}, {}
    for actors in (1, 4):
        folder = tmp_path / str(actors)
        arguments = [cluster.gcs, str(tmp_path / "photos"), tower.model_dump_json(), str(folder), str(actors)]
        command = [sys.executable, "-m", "tests.mining.mining_on", *arguments]
        environment = {**cluster.environment, "PYTHONPATH": str(PROJECT), "RAY_ADDRESS": cluster.gcs}
        done = subprocess.run(command, env=environment, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
        nodes[actors], found[actors] = json.loads(done.stdout.splitlines()[-1]), hashes(folder)
    assert len(nodes[4]) == 2
    assert found[1] == found[4]
    assert [len(parts) for parts in found[4].values()] == [4, 8, 4, 1]
