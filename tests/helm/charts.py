"""The chart as Helm renders it, and the tools that `.ci/install-system` puts into .venv/helm."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "anabranch"
EXAMPLES = ROOT / "deploy" / "helm" / "examples"
HELMS = {version: ROOT / ".venv" / "helm" / f"helm-{version}" for version in (3, 4)}
OLDEST, NEWEST = "1.28", "1.37"
"""Versions of Kubernetes the manifests are checked against; the first is Chart.yaml's least."""

NAMESPACE, RELEASE = "llm", "demo"
"""Where `render` puts the chart, and as what."""

Manifest = dict[str, Any]


def helm(version: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a Helm; the caller looks at how it ended."""
    return subprocess.run(
        [str(HELMS[version]), *words], capture_output=True, text=True, check=False, timeout=60
    )


def render(version: int, values: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Render the chart as the release `demo` in the namespace `llm`, where all operators are there."""
    known = ("--kube-version", OLDEST, "-a", "monitoring.coreos.com/v1", "-a", "ray.io/v1")
    release = (RELEASE, str(CHART), "-n", NAMESPACE)
    return helm(version, "template", *release, "-f", str(values), *known, *words)


def manifests(text: str) -> list[Manifest]:
    """The objects of a rendered chart, by kind and name."""
    found = [document for document in yaml.safe_load_all(text) if document]
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def config_text(objects: Sequence[Manifest]) -> str:
    """The configuration file of a rendered release."""
    return config_files(objects)["config.yaml"]


def config_files(objects: Sequence[Manifest]) -> Mapping[str, str]:
    """All that lies in the folder of a rendered release's configuration file, by name."""
    (files,) = (each["data"] for each in objects if "config.yaml" in (each.get("data") or {}))
    return {name: str(text) for name, text in files.items()}


def selects(selector: Mapping[str, str], pod: Manifest) -> bool:
    """Whether labels select a pod."""
    labels: dict[str, str] = pod["metadata"]["labels"]
    return selector.items() <= labels.items()
