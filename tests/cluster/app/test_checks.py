"""What is said of a source that a run needs and this machine does not see."""

from pathlib import Path

import pytest

from cluster.app import config as configs
from cluster.app.checks import check_sources
from cluster.errors import UserError
from tests.stages import simple


def refused(path: str) -> str:
    """What `check_sources` says of one source."""
    stage = simple("ingest:x", sources={"evaluate.images": path})
    with pytest.raises(UserError) as error:
        check_sources(configs.load("grocery", []), [stage])
    return str(error.value)


def test_a_source_out_of_reach_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(str(tmp_path / "none")).endswith("none does not exist; correct the path or bring the files")
    assert "evaluate.images: nosuchstore://photos cannot be read: " in refused("nosuchstore://photos")

    def out_of_reach(uri: str) -> None:
        raise OSError(f"AWS Error ACCESS_DENIED for {uri}")

    monkeypatch.setattr("cluster.stage.fingerprint", out_of_reach)
    assert "evaluate.images: s3://photos cannot be read: AWS Error ACCESS_DENIED" in refused("s3://photos")


def test_where_the_bundled_photos_are_is_said() -> None:
    assert refused(str(configs.PROJECT / "tests" / "data" / "none")).endswith("not in the wheel")
