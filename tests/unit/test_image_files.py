"""The files that an image is built from and run with, as far as no podman is needed to judge them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from cluster import config as configuration

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _requirements(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for file in (ROOT / "pyproject.toml", FILES / "requirements.py"):
        (folder / file.name).write_text(file.read_text())
    command = [sys.executable, str(folder / "requirements.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_both_variants_install_what_the_project_needs_and_differ_in_pytorch(tmp_path: Path) -> None:
    """All dependencies, for a CPU or for CUDA; another variant is refused by name."""
    cpu, cuda = (_requirements(tmp_path, each, "9.9").stdout.splitlines() for each in ("cpu", "cuda"))
    assert (cpu[0], cuda[0]) == ("torch==9.9+cpu", "torch==9.9")
    assert cpu[1:] == cuda[1:]
    assert set(PROJECT["project"]["dependencies"]) < set(cpu)
    assert "'rocm'" in _requirements(tmp_path, "rocm", "9.9").stderr


def test_the_build_sees_every_package_of_the_wheel() -> None:
    """None is left out of what is sent to a build; of the rest, what builds the wheel."""
    seen = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert set(PROJECT["tool"]["scikit-build"]["wheel"]["packages"]) <= seen
    assert {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= seen


def test_composed_services_may_little_and_are_reached_from_this_machine_only() -> None:
    """Roots are read only, no service keeps a capability, ports are published on loopback."""
    for service in yaml.safe_load((FILES / "compose.yaml").read_text())["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_prometheus_looks_where_the_composed_cluster_shows_its_metrics() -> None:
    """Each process of cluster.yaml has its target: the ports are those of the configuration file."""
    config = configuration.load(FILES / "cluster.yaml")
    base = config.telemetry.metrics_port
    assert base is not None
    (job,) = yaml.safe_load((FILES / "prometheus.yaml").read_text())["scrape_configs"]
    found = {
        group["labels"]["app_kubernetes_io_component"]: group["targets"] for group in job["static_configs"]
    }
    wanted = {
        "gateway": range(config.gateway.replicas),
        "controller": range(99, 100),
        "dense": range(100, 100 + config.dense.replicas),
        "attention": range(2000, 2000 + config.attention.replicas),
    }
    assert found == {
        role: [f"anabranch:{config.port(base, offset)}" for offset in offsets]
        for role, offsets in wanted.items()
    }
