"""Health over plain HTTP beside the metrics: what a gRPC server says to those who have its certificate."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter

from cluster import rpc, telemetry
from cluster.config import SecurityConfig, TlsConfig
from cluster.health import OwnHealth
from tests.certificates import Authority, authority

SERVICE = "anabranch.v1.SomeService"


@dataclass
class Process:
    """A gRPC server with mutual TLS, and the port beside it that anybody may ask."""

    server: grpc.Server
    health: health.HealthServicer
    metrics_port: int

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, refusal.read().decode()


@pytest.fixture
def signer(tmp_path: Path) -> Authority:
    """Signs for the process."""
    return authority(tmp_path)


@pytest.fixture
def process(signer: Authority) -> Iterator[Process]:
    """Has a certificate for a name, as a pod has."""
    tls = signer.tls("pod", mutual=True, hosts=["members.test"])
    running = start(tls.model_copy(update={"member_name": "members.test"}))
    yield running
    running.server.stop(0).wait(5)


def start(tls: TlsConfig) -> Process:
    """Serve on loopback."""
    server, servicer = rpc.server(threads=2), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = rpc.bind(server, "127.0.0.1", 0, SecurityConfig(tls=tls))
    server.start()
    registry = CollectorRegistry()
    Counter("words", "Words counted.", registry=registry).inc(3)
    problem = OwnHealth(f"127.0.0.1:{port}", tls).problem
    return Process(server, servicer, telemetry.serve_metrics(registry, "127.0.0.1", 0, problem))


def test_health_is_what_the_server_says(process: Process) -> None:
    """Of the process and of each service; metrics are still at every other path."""
    assert process.get("/health") == (200, "serving\n")
    process.health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    assert process.get(f"/health/{SERVICE}") == (200, "serving\n")
    process.health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    assert process.get(f"/health/{SERVICE}") == (503, "not serving\n")
    assert process.get("/health/anabranch.v1.Unknown")[0] == 503
    assert process.get("/health")[0] == 200
    assert "words_total 3.0" in process.get("/metrics")[1]


def test_a_server_that_does_not_answer_is_not_healthy(process: Process) -> None:
    """Its port is asked, not a flag of this process."""
    process.server.stop(0).wait(5)
    status, problem = process.get("/health")
    assert status == 503
    assert "refused" in problem


def test_a_certificate_without_the_members_name_is_not_healthy(signer: Authority) -> None:
    """Its peers would refuse it too, and the answer says why."""
    tls = signer.tls("pod", hosts=["another.test"])
    process = start(tls.model_copy(update={"member_name": "members.test"}))
    status, problem = process.get("/health")
    process.server.stop(0).wait(5)
    assert status == 503
    assert "Hostname Verification" in problem
