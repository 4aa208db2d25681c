"""The image: really built without a registry, and run as compose.yaml runs it."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.charts import ROOT
from tests.models import tiny_model
from tests.redis_server import BINARY, MISSING
from tests.system.hosts import Host, network
from tests.system.podman import Podman, flags_of, podman

pytestmark = [pytest.mark.system, pytest.mark.timeout(540)]

IMAGE = "localhost/anabranch"
FILES = ROOT / "deploy" / "image"
ANSWERS_S = 90.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """A podman that has built the image for CPUs."""
    with podman(tmp_path_factory.mktemp("podman")) as engine:
        engine.import_base()
        engine.build(IMAGE, VARIANT="cpu")
        yield engine


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A network of its own, in which a Redis answers on its usual port."""
    assert BINARY is not None, MISSING
    with network(1) as (host,):
        redis = host.start([BINARY, "--save", "", "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
        try:
            yield host
        finally:
            redis.kill()
            redis.wait(10)


def _inside(engine: Podman, script: str) -> str:
    words = ("run", "--rm", "--network=none", "--entrypoint", "sh", IMAGE, "-c", script)
    return engine.run(*words).stdout


def test_it_runs_as_a_user_of_its_own_and_says_what_is_in_it(engine: Podman) -> None:
    """The declared user is not root; the label leads to a list of all packages, Debian's and Python's."""
    (found,) = json.loads(engine.run("image", "inspect", IMAGE).stdout)
    assert found["Config"]["User"] == "10001:10001"
    listed = json.loads(_inside(engine, f"cat {found['Config']['Labels']['io.anabranch.sbom']}"))
    urls = {component["purl"].partition("@")[0] for component in listed["components"]}
    assert {"pkg:pypi/anabranch", "pkg:pypi/torch", "pkg:deb/debian/libc6"} <= urls


def test_no_layer_of_it_has_tools_to_build_with(engine: Podman) -> None:
    """Neither compiler nor headers nor lists of packages; the compiled kernel is there all the same, and pip,
    by which models are fetched.
    """
    found = _inside(engine, "for each in cc gcc g++ ld make cmake ninja; do command -v $each; done; true")
    assert found == ""
    left = "find /var/lib/apt/lists /usr/include /usr/share/python-wheels -type f 2>/dev/null; true"
    assert _inside(engine, left) == ""
    assert "_native" in _inside(engine, "ls /opt/program/workers/kernels/cpu")
    assert _inside(engine, "python -m pip --version").startswith("pip ")


def test_it_answers_a_request_as_composed(engine: Podman, host: Host, tmp_path: Path) -> None:
    """The service of compose.yaml, on a root that is read only and without any capability, becomes a cluster
    that answers through its gateway, keeps its members in Redis, and ends by itself when told to.
    """
    models = tmp_path / "models"
    tiny_model(models / "tiny", tokenizer=True)
    for path in (tmp_path, models, *models.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    service: dict[str, Any] = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]["anabranch"]
    flags = flags_of(service, {"models": models, "./cluster.yaml": FILES / "cluster.yaml"})
    place = ["--network", f"ns:/run/netns/{host.namespace}", "--add-host", "redis:127.0.0.1"]
    engine.run(
        "run",
        "--detach",
        "--name",
        "cluster",
        *place,
        *flags,
        IMAGE,
        *service["command"],
        "--model",
        "/models/tiny",
    )
    answer = _answer(engine)
    assert answer["usage"]["completion_tokens"] > 0
    engine.run("stop", "--time", service["stop_grace_period"].removesuffix("s"), "cluster", deadline_s=90)
    (ended,) = json.loads(engine.run("container", "inspect", "cluster").stdout)
    assert ended["State"]["ExitCode"] == 0, engine.run("logs", "cluster").stdout[-3000:]


def _answer(engine: Podman) -> dict[str, Any]:
    """What `anabranch generate` prints in the container, as soon as the cluster serves."""
    end_s = time.monotonic() + ANSWERS_S
    while True:
        words = (
            "exec",
            "cluster",
            "anabranch",
            "generate",
            "The river divides",
            "--max-tokens",
            "8",
            "--json",
        )
        done = engine.run(*words, check=False)
        if done.returncode == 0:
            return dict(json.loads(done.stdout.splitlines()[-1]))
        logs = engine.run("logs", "cluster", check=False)
        assert time.monotonic() < end_s, done.stderr + logs.stdout[-3000:] + logs.stderr[-3000:]
        threading.Event().wait(1.0)
