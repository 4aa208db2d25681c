"""The registry's suite against a Redis in a container, as it runs where a container engine answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helm.charts import ROOT
from tests.redis_server import BINARY, MISSING
from tests.system.hosts import network
from tests.system.podman import Podman, podman

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

IMAGE = "docker.io/library/redis:latest"
"""What testcontainers asks for."""

_SUITE = ("tests/integration/test_registry.py", "-m", "redis", "-k", "redis and not secure")
_SUITE_S = 120.0


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """A podman that has this machine's Redis under that name, and no registry to ask."""
    assert BINARY is not None, MISSING
    with podman(tmp_path_factory.mktemp("podman")) as engine:
        engine.import_program(Path(BINARY), IMAGE, "--protected-mode", "no", "--save", "")
        yield engine


def test_the_registry_suite_runs_against_a_container(engine: Podman, tmp_path: Path) -> None:
    """Through testcontainers and podman's API, with nothing but what an engine's presence changes."""
    told = {
        "TESTCONTAINERS_RYUK_DISABLED": "true",  # another image; here the whole engine is removed
        "TESTCONTAINERS_CONNECTION_MODE": "docker_host",  # this machine may be a container itself
    }
    told |= {key: value for key, value in os.environ.items() if key != "TEST_REDIS_URL"}
    log = tmp_path / "suite.log"
    with network(1) as (host,), engine.api(host) as address, log.open("wb") as file:
        words = [sys.executable, "-m", "pytest", *_SUITE]
        told["DOCKER_HOST"] = address
        suite = host.start(words, cwd=ROOT, env=told, stdout=file, stderr=subprocess.STDOUT)
        try:
            outcome = suite.wait(_SUITE_S)
        finally:
            suite.kill()
    assert outcome == 0, log.read_text()[-5000:]
    assert engine.images_started() == {IMAGE}
