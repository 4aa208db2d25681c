"""The mode kuberay: its RayCluster as rendered, beside the operator's own definition of one."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import config as configuration
from tests.helm.charts import CHART, EXAMPLES, Manifest, config_text, helm, manifests, selects

OBJECTS = manifests((EXAMPLES / "kuberay" / "rendered.yaml").read_text())
VALUES = str(EXAMPLES / "kuberay" / "values.yaml")
FOLDER = os.environ.get("ANABRANCH_KUBERAY")
MISSING = "NOT CHECKED: set ANABRANCH_KUBERAY to a folder with KubeRay's rayclusters.yaml"


def _cluster() -> Manifest:
    (found,) = (each for each in OBJECTS if each["kind"] == "RayCluster")
    return copy.deepcopy(found)


def _strict(schema: Any) -> Any:
    """Kubernetes' schema as JSON Schema: closed to unknown fields, nullable and int-or-string spelled out."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(each) for key, each in schema.items() if key not in ("nullable", "format")}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in found:
        found["type"] = [found["type"], "null"]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not is_open:
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    """The operator's schema of ray.io/v1."""
    if FOLDER is None:
        pytest.skip(MISSING)
    described = yaml.load((Path(FOLDER) / "rayclusters.yaml").read_text(), yaml.CSafeLoader)
    (version,) = (each for each in described["spec"]["versions"] if each["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the definition leaves open
    return dict(schema)


@pytest.mark.kuberay
def test_the_operator_would_take_the_cluster(definition: dict[str, Any]) -> None:
    """Every field is one of its definition's, and none is missing."""
    jsonschema.validate(_cluster(), definition, jsonschema.Draft7Validator)


@pytest.mark.kuberay
def test_the_definition_refuses_what_it_does_not_know(definition: dict[str, Any]) -> None:
    """So that the check above can fail: an unknown field deep inside, and a group without its bounds."""
    unknown, boundless = _cluster(), _cluster()
    unknown["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    del boundless["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    for wrong in (unknown, boundless):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, definition, jsonschema.Draft7Validator)


def _pods() -> Iterator[Manifest]:
    spec = _cluster()["spec"]
    yield spec["headGroupSpec"]["template"]
    yield from (group["template"] for group in spec["workerGroupSpecs"])


def test_no_pod_may_more_than_those_of_the_other_mode() -> None:
    """Not root, root read-only, no capability, no token of Kubernetes, limits."""
    for pod in _pods():
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert not pod["spec"]["automountServiceAccountToken"]
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


def test_each_node_has_room_for_one_process_of_its_role(tmp_path: Path) -> None:
    """The controller joins the Ray cluster and demands of a node what only its role's nodes have; it starts
    as many processes of each role as there are nodes.
    """
    file = tmp_path / "config.yaml"
    file.write_text(config_text(OBJECTS))
    config = configuration.load(file)
    assert config.ray.address is not None
    assert config.placement.exclusive
    replicas = {
        "gateway": config.gateway.replicas,
        "dense": config.dense.replicas,
        "attention": config.attention.replicas,
    }
    for group in _cluster()["spec"]["workerGroupSpecs"]:
        role = group["groupName"]
        offered = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert offered == {f"anabranch_{role}": 1}
        assert group["replicas"] == replicas[role]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(group["rayStartParams"]["memory"]) == int(limits["memory"].removesuffix("Mi")) * 2**20


def test_clients_and_members_find_the_pods() -> None:
    """Services select pods of the RayCluster, by the ports these declare."""
    services = [
        each for each in OBJECTS if each["kind"] == "Service" and "redis" not in each["metadata"]["name"]
    ]
    assert len(services) == 3
    for service in services:
        (pod,) = (pod for pod in _pods() if selects(service["spec"]["selector"], pod))
        declared = {
            port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", ())
        }
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= declared


def test_the_mode_has_no_pods_beside_the_cluster() -> None:
    """Nothing else runs roles, and the chart brings neither the operator nor its definitions."""
    kinds = {each["kind"] for each in OBJECTS}
    assert kinds.isdisjoint({"Deployment", "CustomResourceDefinition"})
    assert [each["metadata"]["name"] for each in OBJECTS if each["kind"] == "StatefulSet"] == [
        "demo-anabranch-redis"
    ]


@pytest.mark.system
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "install it first"),
        (["-a", "ray.io/v1", "--set", "registry.builtIn=false"], "set registry.builtIn"),
    ],
    ids=str,
)
def test_what_cannot_work_fails_the_render(flags: list[str], words: str) -> None:
    """Without the operator's definitions, and without a Redis: what to do is said."""
    outcome = helm(4, "template", "demo", str(CHART), "-f", VALUES, *flags)
    assert outcome.returncode != 0
    assert words in outcome.stderr


@pytest.mark.system
def test_the_autoscaler_may_change_the_cluster_and_the_controller_follows(tmp_path: Path) -> None:
    """It is told the RayCluster, and may change that one; groups have its bounds, the file has the most, and
    the controller starts as many as there are nodes.
    """
    flags = ["--set", "autoscaler.enabled=true,autoscaler.dryRun=false,autoscaler.attention.most=7"]
    outcome = helm(4, "template", "demo", str(CHART), "-f", VALUES, "-a", "ray.io/v1", *flags)
    objects = manifests(outcome.stdout)
    (scaler,) = (each for each in objects if each["kind"] == "Deployment")
    words = scaler["spec"]["template"]["spec"]["containers"][0]["command"]
    assert words[words.index("--ray-cluster") + 1] == "demo-anabranch"
    (role,) = (each for each in objects if each["kind"] == "Role")
    assert role["rules"] == [
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayclusters"],
            "resourceNames": ["demo-anabranch"],
            "verbs": ["get", "patch", "list", "watch"],
        }
    ]
    (cluster,) = (each for each in objects if each["kind"] == "RayCluster")
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    attention = groups["attention"]
    assert (attention["minReplicas"], attention["maxReplicas"]) == (1, 7)
    assert attention["minReplicas"] <= attention["replicas"] <= attention["maxReplicas"]
    assert groups["gateway"]["minReplicas"] == groups["gateway"]["maxReplicas"]
    file = tmp_path / "config.yaml"
    file.write_text(config_text(objects))
    config = configuration.load(file)
    assert config.placement.elastic
    assert (config.attention.replicas, config.dense.replicas) == (7, 4)
