"""Weights on each node: a hub's cache made by hand, installed packages, and what is missing."""

from pathlib import Path

import pytest
import ray

from cluster.driver.fetch import fetch, fetch_on_every_node
from cluster.errors import UserError
from cluster.weights import Weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACKAGE = Weights(package="tests", file="tiny.py")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An HF_HOME whose hub cache has one file of `someone/model`, and no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    return str(tmp_path)


def test_a_pinned_revision_in_the_cache_needs_no_hub(cache: str) -> None:
    assert fetch(Weights(hub="someone/model", revision=COMMIT), cache).endswith(f"snapshots/{COMMIT}")


def test_what_neither_cache_nor_hub_gives_is_named(cache: str) -> None:
    with pytest.raises(UserError, match="'someone/other' cannot be fetched"):
        fetch(Weights(hub="someone/other", revision=COMMIT), cache)


def test_a_package_is_checked_where_it_is() -> None:
    assert fetch(PACKAGE, None).endswith("tests/tiny.py")
    with pytest.raises(UserError, match="'no_such_package' is not installed"):
        fetch(Weights(package="no_such_package"), None)


def test_every_node_says_what_it_has(ray_session: None) -> None:
    found = fetch_on_every_node([PACKAGE, Weights(package="no_such_package")], None)
    (places,) = found.values()
    assert places[0].endswith("tests/tiny.py")
    assert places[1].startswith("error: ")


def test_a_dead_node_hides_no_other(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = {"NodeID": "0" * 56, "NodeManagerAddress": "10.0.0.9", "Alive": True}
    nodes = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *nodes])
    lost, here = fetch_on_every_node([PACKAGE, PACKAGE], None).values()
    assert [place[:7] for place in lost] == ["error: "] * 2
    assert here[1].endswith("tests/tiny.py")
