"""Imports point down only: app above vdg and cir, these above mining, mining above cluster."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
MAY_IMPORT = {
    "cluster": {"cluster"},
    "mining": {"mining", "cluster"},
    "vdg": {"vdg", "mining", "cluster"},
    "cir": {"cir", "mining", "cluster"},
    "cluster.app": {"cluster", "mining", "vdg", "cir"},
}
HEAVY = {"torch", "transformers", "peft", "deepspeed", "timm", "open_clip", "faiss", "mlflow"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def modules(package: str) -> list[Path]:
    folder = PROJECT / package.replace(".", "/")
    return [path for path in folder.rglob("*.py") if package != "cluster" or "app" not in path.relative_to(folder).parts]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package: str) -> None:
    paths = modules(package)
    assert paths
    for path in paths:
        for name in imports(path):
            if name.split(".")[0] in ("cluster", "mining", "vdg", "cir"):
                assert name.split(".")[0] in MAY_IMPORT[package], f"{path} imports {name}"
                assert package == "cluster.app" or not name.startswith("cluster.app"), f"{path} imports {name}"


@pytest.mark.parametrize("package", ["cluster", "cluster.app", "mining", "vdg", "cir"])
def test_configs_do_not_import_heavy_libraries(package: str) -> None:
    for path in modules(package):
        if path.name == "config.py":
            assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


def test_a_service_in_one_process_imports_no_ray() -> None:
    code = "import sys; import cluster.app.cli, cluster.app.serve.local; assert 'ray' not in sys.modules, 'ray'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)
