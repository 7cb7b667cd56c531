"""`vdg doctor`: its table, its JSON and its exit status."""

import json
from pathlib import Path

from cluster.app.cli import app
from tests.cluster.app.test_cli import RUNNER


def test_a_config_with_a_blocker_ends_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = RUNNER.invoke(app, ["doctor", "grocery", "--set", f"root={tmp_path}/file/root", "--json"])
    assert result.exit_code == 1
    findings = {row["subject"]: row for row in json.loads(result.stdout)}
    assert findings["root"]["state"] == "blocker"
    assert findings["MLflow"]["state"] == "blocker"  # its SQLite file lies in the root


def test_a_table_without_a_config() -> None:
    result = RUNNER.invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0
    for subject in ("packages", "CUDA", "Ray", "MLflow", "root", "shared memory"):
        assert subject in result.stdout


def test_what_a_configs_stages_lack_blocks(tmp_path: Path) -> None:
    given = [f"root={tmp_path}/root", "evaluate.images=nowhere", "vdg.language_model={package: no_such_package}"]
    result = RUNNER.invoke(app, ["doctor", "grocery", "--json", *(part for value in given for part in ("--set", value))])
    assert result.exit_code == 1
    findings = {row["subject"]: row for row in json.loads(result.stdout) if row["state"] == "blocker"}
    assert findings["evaluate.images"]["found"] == "nowhere does not exist"
    assert findings["vdg.language_model"]["advice"] == "install it on every node"
