"""A store that never answers is given up; one that refuses is not."""

import socket
from collections.abc import Iterator

import pytest

from cluster import stores
from cluster.stage import Source


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The query of a store that takes connections, and says nothing."""
    monkeypatch.setattr(stores, "PATIENCE", 0.5)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"scheme=http&endpoint_override=127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_silent_store_is_given_up(silent: str, scheme: str) -> None:
    uri = f"{scheme}://bucket/photos?{silent}{'&region=us-east-1' if scheme == 's3' else ''}"
    with pytest.raises(OSError, match=rf"{scheme}://bucket: no answer in 0 s; correct its credentials"):
        stores.open_store(uri)
    source = Source("evaluate.images", uri)
    assert source.fingerprint() is None
    assert "no answer" in source.problem()


def test_a_local_uri_is_opened_at_once(tmp_path: object) -> None:
    assert stores.open_store(f"file://{tmp_path}")[1] == str(tmp_path)
