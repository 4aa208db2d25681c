"""The rendered release really runs: its commands, environment, configuration and probes, as local pods."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import TlsConfig
from tests.certificates import authority
from tests.helm import tls_program
from tests.helm.charts import manifests, render
from tests.helm.pods import pods_of
from tests.helm.pods_program import PROMPT, TOKENS
from tests.models import NEAR_TIE, reference_tokens, tiny_model
from tests.system.hosts import Host, network

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

VALUES = {
    "model": {"name": "tiny", "delivery": "claim", "claim": "models", "path": "tiny"},
    "gateway": {"replicas": 1},
    "dense": {"replicas": 2},
    "attention": {"arena": "16MiB"},
    "config": {
        "attention": {"block_tokens": 8},
        "placement": {"shard_tokens": 32},
        "controller": {"heartbeat_ms": 100},
        "telemetry": {"cost": {"dense": "core", "attention": "core"}},
    },
    "monitoring": {
        "prices": '[core]\nprice_per_hour_usd = 0.05\nprice_date = 2026-11-01\nsource = "an example"\n'
    },
}

TLS_VALUES = VALUES | {
    "dense": {"replicas": 1},
    "attention": {"arena": "16MiB", "replicas": 1},
    "tls": {"existingSecret": "certificates", "mutual": True},
}
NAMES = ("demo-anabranch.llm.svc", "demo-anabranch-controller.llm.svc", "demo-anabranch-gateway.llm.svc")
"""What the chart's README asks of the certificate."""


@pytest.fixture(scope="module")
def claim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the claim holds: a tiny model."""
    claim = tmp_path_factory.mktemp("claim")
    tiny_model(claim / "tiny", tokenizer=True)
    for path in (claim, *claim.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return claim


def _run(program: str, values: Mapping[str, Any], folder: Path, *given: str) -> Mapping[str, Any]:
    """What a program says of a release with these values, told what was given."""
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = render(4, folder / "values.yaml")
    assert rendered.returncode == 0, rendered.stderr
    (folder / "rendered.yaml").write_text(rendered.stdout)
    needed = len(pods_of(manifests(rendered.stdout), [Host("", "")] * 100))
    with network(needed + 1) as (node, *hosts):
        words = [f"{host.namespace}={host.address}" for host in hosts]
        command = [sys.executable, "-m", f"tests.helm.{program}", str(folder / "rendered.yaml"), *given]
        process = node.start([*command, str(folder), *words], stdout=subprocess.PIPE)
        output, _ = process.communicate(timeout=220)
    assert process.returncode == 0
    return dict(json.loads(output.splitlines()[-1]))


@pytest.fixture(scope="module")
def outcome(claim: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What came of the program: see `tests.helm.pods_program`."""
    return _run("pods_program", VALUES, tmp_path_factory.mktemp("pods"), str(claim))


@pytest.fixture(scope="module")
def encrypted(claim: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The same of a small release with mutual TLS: see `tests.helm.tls_program`."""
    folder = tmp_path_factory.mktemp("tls")
    signer = authority(folder)
    client = signer.tls("client").model_copy(update={"member_name": NAMES[0]})
    secret = _secret(folder / "secret", signer.tls("pods", hosts=NAMES))
    return _run("tls_program", TLS_VALUES, folder, str(claim), str(secret), client.model_dump_json())


def _secret(folder: Path, tls: TlsConfig) -> Path:
    """A Secret as the kubelet mounts it."""
    folder.mkdir()
    for name, path in (("tls.crt", tls.certificate), ("tls.key", tls.key), ("ca.crt", tls.authority)):
        assert path is not None
        (folder / name).write_bytes(Path(path).read_bytes())
    return folder


@pytest.mark.parametrize("role", ["attention", "dense"])
def test_a_stream_outlives_the_pod_that_serves_it(role: str, outcome: Mapping[str, Any], claim: Path) -> None:
    """Deleted in the middle of a stream, the worker that holds its cache, or the one that computes it, hands
    over and ends by itself, before the stream does; every token is the reference's.
    """
    found = outcome[role]
    assert found["deleted"] == 0, found["log"]
    assert found["early"], "the worker was waited for until the stream's end"
    (reference,) = reference_tokens(claim / "tiny", [PROMPT], TOKENS)
    sharp = next((i for i, gap in enumerate(reference.gaps) if gap < NEAR_TIE), TOKENS)
    assert tuple(found["tokens"][:sharp]) == reference.tokens[:sharp]
    assert len(found["tokens"]) == TOKENS


def test_the_charts_own_test_passes(outcome: Mapping[str, Any]) -> None:
    """The pod of `helm test` sends its request through the Service's name, and gets tokens."""
    status, answer = outcome["test"]
    assert status == 0, answer
    assert json.loads(answer.splitlines()[-1])["usage"]["completion_tokens"] > 0


def test_every_pod_ends_by_itself_within_its_grace(outcome: Mapping[str, Any]) -> None:
    """preStop and SIGTERM suffice, in the order of a cluster that leaves; nobody is killed."""
    assert set(outcome["last"].values()) == {0}


def test_every_panel_of_the_dashboard_has_data(outcome: Mapping[str, Any]) -> None:
    """A Prometheus that scrapes what the PodMonitor selects, under the labels it asks for, answers each query
    of the dashboard after a short load in which pods were deleted and a request refused.
    """
    assert len(outcome["panels"]) > 15
    assert all(outcome["panels"].values())


def test_prometheus_takes_every_rule(outcome: Mapping[str, Any]) -> None:
    """It evaluates the release's alerts over real series without an error."""
    assert len(outcome["rules"]) > 5
    assert set(outcome["rules"].values()) == {"ok"}


def test_with_tls_the_charts_own_test_passes(encrypted: Mapping[str, Any]) -> None:
    """Members meet by addresses that no certificate knows, and a client's request is answered at the
    Service's name, all with certificates on both sides.
    """
    status, answer = encrypted["test"]
    assert status == 0, answer
    assert json.loads(answer.splitlines()[-1])["usage"]["completion_tokens"] > 0


def test_with_tls_every_token_is_the_references(encrypted: Mapping[str, Any], claim: Path) -> None:
    """Over gRPC lanes, which TLS covers, as over those in plain text."""
    (reference,) = reference_tokens(claim / "tiny", [tls_program.PROMPT], tls_program.TOKENS)
    assert min(reference.gaps) > NEAR_TIE
    assert tuple(encrypted["tokens"]) == reference.tokens


def test_with_mutual_tls_who_has_no_certificate_is_refused(encrypted: Mapping[str, Any]) -> None:
    """By every role, and by the gateway's HTTP; plain text is refused too, and who has one is answered."""
    assert encrypted["https"] == [200, None]
    problems = encrypted["problems"]
    assert problems.keys() == {"gateway", "dense", "attention", "controller"}
    for trusted, anonymous, plain in problems.values():
        assert trusted == ""
        assert anonymous
        assert plain
