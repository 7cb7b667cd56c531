"""The deployment files against the schemas of those who read them."""

import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

DEPLOY = Path(__file__).parents[3] / "cluster" / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def kuberay_schema(name: str) -> Any:
    """A schema of $VDG_SHARED's folder, or of a folder `shared/schemas` beside the project or above; else the test skips."""
    above = [parent / "shared" / "schemas" for parent in Path(__file__).resolve().parents]
    places = [Path(given).parent / "schemas", *above] if (given := os.environ.get("VDG_SHARED")) else above
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        pytest.skip(f"needs KubeRay's schema: no shared/schemas/{name} here or above")
    return json.loads(found.read_text())


def unknown_fields(node: Any, schema: Any, path: str = "") -> Iterator[str]:
    """KubeRay's schemas let unknown fields pass, and the API server drops them: a misspelt one would go unnoticed."""
    if isinstance(node, list):
        for item in node:
            yield from unknown_fields(item, schema.get("items", {}), f"{path}[]")
    elif isinstance(node, dict) and "properties" in schema:
        for name, value in node.items():
            if name not in schema["properties"]:
                yield f"{path}.{name}"
            else:
                yield from unknown_fields(value, schema["properties"][name], f"{path}.{name}")


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("raycluster.yaml", "rayclusters.v1.json"),
        ("rayjob.yaml", "rayjobs.v1.json"),
        ("rayservice.yaml", "rayservices.v1.json"),
    ],
)
def test_kuberay_takes_the_manifests(name: str, schema: str) -> None:
    manifest, rules = read(name), kuberay_schema(schema)
    jsonschema.Draft202012Validator(rules).validate(manifest)
    assert list(unknown_fields(manifest, rules)) == []
    manifest["spec"]["rayVersoin"] = "2.60.0"
    assert list(unknown_fields(manifest, rules)) == [".spec.rayVersoin"]


def test_the_head_does_no_work_and_asks_for_the_token() -> None:
    spec = read("raycluster.yaml")["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["decode", "gpu"]


def test_the_clusters_of_job_and_service_are_the_cluster() -> None:
    cluster = read("raycluster.yaml")["spec"]
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"] == cluster
    assert read("rayservice.yaml")["spec"]["rayClusterConfig"] == cluster


def test_ray_serve_takes_the_application() -> None:
    from cluster.app.serve import ray as serving

    config = ServeDeploySchema.model_validate(yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{serving.__name__}:{serving.app.__name__}"
    assert serving.Arguments.model_validate(application.args).token_file == Path("/shared/serve-token")
    ports = read("raycluster.yaml")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {"name": "serve", "containerPort": config.http_options.port} in ports
    with pytest.raises(ValidationError, match="token_file"):
        serving.Arguments.model_validate({"config": "/shared/run.yaml"})


def test_rays_launcher_takes_the_machines() -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    manifest = read("vms.yaml")
    jsonschema.validate(manifest, schema)
    assert manifest["head_node_type"] in manifest["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**manifest, "max_wrokers": 1}, schema)


def test_what_the_image_copies_and_installs_is_there() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = [path for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for path in line.split()]
    assert {"cluster", "mining", "vdg", "cir", "tests/data", "constraints.txt"} <= set(copied)
    project = DEPLOY.parents[1]
    assert all((project / path).exists() for path in copied)
    makefile, pins = (project / "Makefile").read_text(), (project / "constraints.txt").read_text()
    (weights,) = re.findall(r"^WEIGHTS := (.+)$", makefile, re.MULTILINE)
    for package in weights.split():
        assert package in pins.splitlines()
        assert package.partition("==")[0] in text
