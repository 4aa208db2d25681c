"""A controller that starts nobody, and processes whose ports are known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from anabranch.v1 import control_pb2, control_pb2_grpc
from cluster import config as configuration
from cluster import rpc
from cluster.errors import InvalidRequest
from cluster.registry.settings import RegistryConfig
from tests.controlled import ControlledCluster, controlled
from tests.redis_server import free_port


@pytest.fixture
def port() -> int:
    """A free port, the next one most likely too."""
    return free_port()


@pytest.fixture
def cluster(
    folder: Path, tmp_path: Path, port: int, request: pytest.FixtureRequest
) -> Iterator[ControlledCluster]:
    """A controller without a registry; the parameter is `placement.own_addresses`."""
    settings = {"attention__port": port, "placement__own_addresses": request.param}
    with controlled(tmp_path, folder, RegistryConfig(), **settings) as cluster:
        yield cluster


@pytest.mark.parametrize(("cluster", "added"), [(False, 1), (True, 0)], indirect=["cluster"])
def test_a_worker_listens_at_the_port_of_its_number(
    cluster: ControlledCluster, port: int, added: int
) -> None:
    """Replica i adds i to the port, or nothing where each has an address to itself; others hear of it."""
    cluster.launch("attention-1")
    cluster.await_ready("attention-1")
    assert cluster.members()["attention-1"].address == f"127.0.0.1:{port + added}"


@pytest.mark.parametrize("cluster", [True], indirect=True)
def test_a_controller_alone_loads_no_ray_and_stops_nobody(cluster: ControlledCluster) -> None:
    """A shutdown is refused in words, and not announced; nothing of Ray is in its memory."""
    with rpc.channel(f"127.0.0.1:{cluster.port}", configuration.TlsConfig()) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Shutdown(control_pb2.ShutdownRequest(grace_ms=0), timeout=5)
        problem = rpc.from_rpc(refused.value)
        assert isinstance(problem, InvalidRequest)
        assert "where they were started" in problem.message
        assert not stub.GetFleet(control_pb2.GetFleetRequest(), timeout=5).stopping
    assert "_raylet" not in Path(f"/proc/{cluster.processes['controller'].pid}/maps").read_text()
