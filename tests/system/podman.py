"""Containers without a registry: Debian's podman and runc, over a base that is made here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helm.charts import ROOT
from tests.system.hosts import Host

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
_API_S = 20.0
_TIDY_S = 20.0


class Podman:
    """Images and containers below one folder, which is removed with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "containers.conf").write_text(_SETTINGS)

    def run(
        self, *words: str, deadline_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one command of podman's."""
        done = subprocess.run(
            [*self._command(), *words],
            cwd=ROOT,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=deadline_s,
        )
        assert done.returncode == 0 or not check, (
            f"podman {words}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done

    def _command(self) -> list[str]:
        assert PODMAN is not None, MISSING
        places = {"root": "root", "runroot": "run", "tmpdir": "state"}
        return [PODMAN, *(f"--{flag}={self._folder / place}" for flag, place in places.items())]

    def _environment(self) -> dict[str, str]:
        return os.environ | {"CONTAINERS_CONF": str(self._folder / "containers.conf")}

    @contextlib.contextmanager
    def api(self, host: Host) -> Iterator[str]:
        """Docker's API, as podman speaks it, while the block runs; yields its address. Containers' networks
        and ports are the host's, and go with it.
        """
        place = self._folder / "api.sock"
        address, log = f"unix://{place}", self._folder / "api.log"
        # Not as processes of the host are started: these have a /sys without control groups.
        words = ["nsenter", f"--net=/run/netns/{host.namespace}", *self._command()]
        words += ["system", "service", "--time=0", address]
        with log.open("wb") as file:
            service = subprocess.Popen(words, env=self._environment(), stdout=file, stderr=file)
        try:
            end_s = time.monotonic() + _API_S
            while not place.exists():
                assert service.poll() is None, log.read_text()
                assert time.monotonic() < end_s, "podman's API never listened"
                threading.Event().wait(0.05)
            yield address
        finally:
            service.terminate()
            service.wait(_API_S)

    def images_started(self) -> set[str]:
        """The images of which containers were started."""
        told = self.run("events", "--stream=false", "--filter", "event=start", "--format", "{{.Image}}")
        return set(told.stdout.split())

    def import_program(self, program: Path, image: str, *arguments: str) -> None:
        """An image of one program of this machine and the libraries it is linked with."""
        archive = self._folder / "program.tar"
        linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True, timeout=10)
        with tarfile.open(archive, "w") as tar:
            for path in (str(program), *re.findall(r"(/\S+) \(0x", linked.stdout)):
                tar.add(os.path.realpath(path), path)
        self.run("import", "--change", f"CMD {json.dumps([str(program), *arguments])}", str(archive), image)
        archive.unlink()

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
        """Containers, images, and what podman has mounted. Behind a container that has just ended a process
        of podman's tidies up, and may be in the way.
        """
        self.run("rm", "--all", "--force", "--time", "0")
        end_s = time.monotonic() + _TIDY_S
        while (done := self.run("system", "reset", "--force", check=False)).returncode:
            assert time.monotonic() < end_s, done.stderr
            threading.Event().wait(0.2)
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
