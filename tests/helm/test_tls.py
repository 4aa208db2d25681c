"""TLS in the rendered chart: who mounts the certificate, and what no longer speaks plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import TlsConfig
from tests.helm.charts import CHART, NAMESPACE, RELEASE, Manifest, config_text, helm, manifests, render

pytestmark = pytest.mark.system

TLS = {"existingSecret": "certificates", "mutual": True}
MODES: dict[str, dict[str, Any]] = {
    "statefulset": {"mode": "statefulset", "autoscaler": {"enabled": True}},
    "kuberay": {"mode": "kuberay", "registry": {"url": "rediss://redis.data.svc:6379/0"}},
}
MEMBERS = {"controller", "gateway", "dense", "attention"}


def _rendered(tmp_path: Path, values: dict[str, Any]) -> list[Manifest]:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    outcome = render(4, file)
    assert outcome.returncode == 0, outcome.stderr
    return manifests(outcome.stdout)


def _pods(objects: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Component and specification of every pod that the objects make."""
    for each in objects:
        spec = each.get("spec", {})
        groups = (
            [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if each["kind"] == "RayCluster" else [spec]
        )
        templates = [each] if each["kind"] == "Pod" else [g["template"] for g in groups if "template" in g]
        for template in templates:
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template["spec"]


def _own(pod: Manifest) -> Manifest:
    """The container that runs our process: beside Ray's, the last one."""
    return dict(pod["containers"][-1])


@pytest.mark.parametrize("mode", MODES)
def test_every_pod_that_speaks_to_members_has_the_certificate(mode: str, tmp_path: Path) -> None:
    """Members, the autoscaler and the pod of `helm test`: three files of the Secret, read-only, and nobody
    else may read the key.
    """
    pods = dict(_pods(_rendered(tmp_path, MODES[mode] | {"tls": TLS})))
    assert pods.keys() == MEMBERS | {"test"} | ({"autoscaler"} if mode == "statefulset" else set())
    for pod in pods.values():
        (secret,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "tls")
        assert secret["secretName"] == "certificates"
        assert {item["key"] for item in secret["items"]} == {"tls.crt", "tls.key", "ca.crt"}
        assert secret["defaultMode"] & 0o007 == 0
        mount = next(mount for mount in _own(pod)["volumeMounts"] if mount["name"] == "tls")
        assert mount == {"name": "tls", "mountPath": "/etc/anabranch/tls", "readOnly": True}


@pytest.mark.parametrize("mode", MODES)
def test_the_configuration_file_then_allows_no_plain_text(mode: str, tmp_path: Path) -> None:
    """It names what is mounted, lanes are gRPC's alone, and Services say what is spoken."""
    objects = _rendered(tmp_path, MODES[mode] | {"tls": TLS})
    config = yaml.safe_load(config_text(objects))
    folder = "/etc/anabranch/tls"
    tls = TlsConfig(
        certificate=f"{folder}/tls.crt",
        key=f"{folder}/tls.key",
        authority=f"{folder}/ca.crt",
        mutual=True,
        member_name="demo-anabranch.llm.svc",
    )
    assert config["security"] == {"tls": tls.model_dump()}
    assert config["lanes"] == {"transports": ["grpc"]}
    spoken = [
        port["appProtocol"] for each in objects if each["kind"] == "Service" for port in each["spec"]["ports"]
    ]
    assert set(spoken) == {"https"}


def test_without_a_secret_plain_text_is_a_choice_that_the_file_names(tmp_path: Path) -> None:
    """Nothing is mounted, and `security.insecure` says so."""
    objects = _rendered(tmp_path, MODES["statefulset"])
    assert yaml.safe_load(config_text(objects))["security"] == {"insecure": True}
    for _, pod in _pods(objects):
        assert "tls" not in {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("mode", MODES)
def test_no_probe_needs_a_certificate(mode: str, tmp_path: Path) -> None:
    """The kubelet has none: it asks the metrics' port of a container that declares it."""
    probed = set()
    for component, pod in _pods(_rendered(tmp_path, MODES[mode] | {"tls": TLS})):
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = _own(pod).get(kind)
            if probe is not None:
                probed.add(component)
                assert probe["httpGet"]["path"].startswith("/health")
                assert probe["httpGet"]["port"] in {port["name"] for port in _own(pod)["ports"]}
    assert probed == (MEMBERS if mode == "statefulset" else {"controller", "gateway"})


def test_notes_and_readme_ask_the_same_names_of_a_certificate(tmp_path: Path) -> None:
    """Those of the Services that speak TLS, and the one that members show."""
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"tls": TLS}))
    install = ("install", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(file), "--dry-run=client")
    told = set(re.findall(r"^   (demo-[\w.-]+)", helm(4, *install).stdout, re.MULTILINE))
    table = re.findall(r"^\| `river-([\w.-]+)`", (CHART / "README.md").read_text(), re.MULTILINE)
    assert told == {f"demo-{name}" for name in table}
    services = {"demo-anabranch-controller", "demo-anabranch-gateway", "demo-anabranch-gateway-headless"}
    assert told == {f"{name}.llm.svc" for name in services | {"demo-anabranch"}}
