"""Containers without a registry: Debian's podman and runc, over a base that is made here."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helm.charts import ROOT

PODMAN = shutil.which("podman")
MISSING = "no podman: .ci/install-system installs Debian's"

_SETTINGS = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
"""
_BASE = "docker.io/library/debian:bookworm-slim"
_PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT")
_BUILD_S = 500.0


class Podman:
    """Images and containers below one folder, which is removed with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "containers.conf").write_text(_SETTINGS)

    def run(
        self, *words: str, deadline_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one command of podman's."""
        assert PODMAN is not None, MISSING
        places = ["--root", str(self._folder / "root"), "--runroot", str(self._folder / "run")]
        environment = os.environ | {"CONTAINERS_CONF": str(self._folder / "containers.conf")}
        done = subprocess.run(
            [PODMAN, *places, *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=deadline_s,
        )
        assert done.returncode == 0 or not check, (
            f"podman {words}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done

    def import_base(self) -> None:
        """Debian's least system under the name of the Containerfile's base, as no registry is asked."""
        system, archive = self._folder / "system", self._folder / "system.tar"
        make = ["debootstrap", "--variant=minbase", "bookworm", str(system)]
        subprocess.run(make, check=True, capture_output=True, timeout=_BUILD_S)
        subprocess.run(["tar", "-C", str(system), "-cf", str(archive), "."], check=True, timeout=_BUILD_S)
        self.run("import", str(archive), _BASE)
        shutil.rmtree(system)
        archive.unlink()

    def build(self, name: str, **arguments: str) -> None:
        """Build the Containerfile, with build arguments, and pip as it is set up on this machine."""
        words = ["build", "--pull=never", "--jobs=2", "--network=host", "-f", "deploy/image/Containerfile"]
        for key, value in arguments.items():
            words += ["--build-arg", f"{key}={value}"]
        self.run(*words, *_pip_of_this_machine(), "-t", name, ".", deadline_s=_BUILD_S)

    def remove_everything(self) -> None:
        """Containers, images, and what podman has mounted."""
        self.run("rm", "--all", "--force", "--time", "0")
        self.run("system", "reset", "--force")
        shutil.rmtree(self._folder)


def _pip_of_this_machine() -> Iterator[str]:
    """Its variables, and the folders and files of this machine that they name, which are shown to the build
    elsewhere, where they cover nothing.
    """
    for name in _PIP:
        value = os.environ.get(name, "")
        if value.startswith("/"):
            yield from ("--volume", f"{value}:/run/host{value}:ro", "--build-arg", f"{name}=/run/host{value}")
        elif value:
            yield from ("--build-arg", f"{name}={value}")


def flags_of(service: Mapping[str, Any], volumes: Mapping[str, Path]) -> Sequence[str]:
    """What `podman run` is told for a service of compose.yaml; `volumes`: what its sources are here."""
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    words = ["--read-only", "--cap-drop=ALL"]
    words += [f"--security-opt={option}" for option in service["security_opt"]]
    words += [f"--tmpfs={place}" for place in service["tmpfs"]]
    words += [f"--shm-size={size.removesuffix('b')}" for size in [service.get("shm_size")] if size]
    for volume in service["volumes"]:
        source, place = volume.split(":", 1)
        words.append(f"--volume={volumes[source]}:{place}")
    return words


@contextlib.contextmanager
def podman(folder: Path) -> Iterator[Podman]:
    """A podman that has nothing, and leaves nothing."""
    engine = Podman(folder)
    try:
        yield engine
    finally:
        engine.remove_everything()
