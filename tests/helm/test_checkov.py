"""What checkov, whose rules are those that clusters enforce, has against the rendered examples."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.charts import EXAMPLES, ROOT, Manifest, manifests

pytestmark = pytest.mark.system

CHECKOV = ROOT / ".venv" / "checkov" / "bin" / "checkov"
MISSING = "no checkov: .ci/install-checkov installs it"

Finding = tuple[str, str]
"""Rule and component."""

EVERYWHERE = {
    "CKV_K8S_11": "a limit of CPU stops threads that others wait for, while cores are free",
    "CKV_K8S_15": "when to pull is a value, image.pullPolicy",
    "CKV_K8S_21": "the namespace is that of the release, which no object repeats",
    "CKV_K8S_35": "passwords are variables of one process; certificates and clients' keys are files",
    "CKV_K8S_43": "a digest is a value, image.digest",
}
SOMEWHERE = {
    ("CKV_K8S_38", "autoscaler"): "it alone speaks to Kubernetes",
    ("CKV_K8S_8", "autoscaler"): "it serves nobody, and ends where it cannot go on",
    ("CKV_K8S_9", "autoscaler"): "it serves nobody",
    ("CKV_K8S_8", "test"): "it runs once",
    ("CKV_K8S_9", "test"): "it runs once",
    ("CKV_K8S_8", "ray"): "KubeRay's operator adds the probes of Ray's containers",
    ("CKV_K8S_9", "ray"): "KubeRay's operator adds the probes of Ray's containers",
}


def _objects() -> Iterator[Manifest]:
    """Of all examples; the pods of a RayCluster, which checkov does not know, by themselves."""
    for shape in sorted(EXAMPLES.iterdir()):
        for each in manifests((shape / "rendered.yaml").read_text()):
            yield each
            if each["kind"] == "RayCluster":
                spec = each["spec"]
                for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                    metadata = group["template"]["metadata"] | {"name": "demo-anabranch-ray"}
                    yield {"apiVersion": "v1", "kind": "Pod"} | group["template"] | {"metadata": metadata}


def _findings(objects: Sequence[Manifest], folder: Path) -> set[Finding]:
    assert CHECKOV.exists(), MISSING
    file = folder / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    # --skip-download: nothing is asked of its maker's servers.
    words = ["--framework", "kubernetes", "--skip-download", "--quiet", "-o", "json", "-f", str(file)]
    outcome = subprocess.run([str(CHECKOV), *words], capture_output=True, text=True, check=False, timeout=60)
    report: dict[str, Any] = json.loads(outcome.stdout)
    assert report["summary"]["passed"] > 50, outcome.stdout + outcome.stderr
    failed = report["results"]["failed_checks"]
    return {(each["check_id"], each["resource"].rpartition("-")[2]) for each in failed}


def test_nothing_is_wrong_but_what_has_a_reason(tmp_path: Path) -> None:
    """And no reason is left of what is no longer so."""
    found = _findings(list(_objects()), tmp_path)
    assert {(rule, part) for rule, part in found if rule not in EVERYWHERE} == SOMEWHERE.keys()
    assert {rule for rule, _ in found} >= EVERYWHERE.keys()


def test_a_pod_that_may_too_much_is_found(tmp_path: Path) -> None:
    """So that the check above can fail: a root that may be written, in one container of one pod."""
    objects = copy.deepcopy([each for each in _objects() if each["metadata"]["name"].endswith("-gateway")])
    (first, *_) = (each for each in objects if each["kind"] == "Deployment")
    first["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    assert ("CKV_K8S_22", "gateway") in _findings(objects, tmp_path)
