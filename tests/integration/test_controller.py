"""The controller with a private Ray and real processes that only join."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from anabranch.v1 import control_pb2, control_pb2_grpc
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import AlreadyExists, InvalidRequest
from controller.events import ClusterReady, SlotChanged
from controller.slots import Phase
from controller.state import StateFolder
from tests.integration.clusters import (
    DEADLINE_S,
    RunningCluster,
    configured,
    descendants,
    joining,
    running,
)
from tests.listening import tcp_listeners


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and state of this module's clusters."""
    return tmp_path_factory.mktemp("controller")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[RunningCluster]:
    """A running cluster: one gateway, one dense worker, one attention worker of two arenas."""
    config = configured(folder, attention__replicas=1, attention__tiers=[{"arena": "1MiB"}])
    with running(config, joining()) as cluster:
        cluster.await_ready()
        yield cluster


def test_all_roles_become_ready_and_the_addresses_are_published(
    cluster: RunningCluster, folder: Path
) -> None:
    """Every slot is announced as it starts and serves; then the record tells clients where to go."""
    seen = {
        (event.slot.worker_id, event.slot.phase) for event in cluster.events if isinstance(event, SlotChanged)
    }
    for name in ("gateway-0", "dense-0", "attention-0"):
        assert {(name, Phase.STARTING), (name, Phase.READY)} <= seen
    record = StateFolder(folder / "state").read()
    assert record.controller == cluster.controller.address
    assert record.gateways == (cluster.member("gateway-0").address,)
    assert record.process_id == os.getpid()
    assert ClusterReady(record) in cluster.events


def test_a_killed_process_comes_back_under_a_new_epoch(cluster: RunningCluster) -> None:
    """Same slot, another process, another epoch."""
    before = cluster.member("dense-0")
    os.kill(before.process_id, signal.SIGKILL)
    cluster.await_phase("dense-0", Phase.PAUSED)
    cluster.await_phase("dense-0", Phase.READY)
    after = cluster.member("dense-0")
    assert after.epoch != before.epoch
    assert after.process_id != before.process_id


def test_a_frozen_process_is_replaced(cluster: RunningCluster) -> None:
    """A process that is stopped, not dead, gives no sign of life: it is killed and started again."""
    before = cluster.member("attention-0")
    os.kill(before.process_id, signal.SIGSTOP)
    cluster.await_phase("attention-0", Phase.ENDING)
    cluster.await_phase("attention-0", Phase.READY)
    assert cluster.member("attention-0").epoch != before.epoch
    assert not Path(f"/proc/{before.process_id}").exists()


def test_the_arenas_of_a_process_end_with_it(cluster: RunningCluster) -> None:
    """When a slot's process was killed nobody of its epoch is a member any more; its successor has both."""
    epoch = cluster.member("attention-0.1").epoch
    os.kill(cluster.member("attention-0").process_id, signal.SIGKILL)
    cluster.await_phase("attention-0", Phase.PAUSED)
    assert epoch not in {member.epoch for member in cluster.controller.fleet().membership.members}
    cluster.await_phase("attention-0", Phase.READY)
    assert cluster.member("attention-0.1").epoch == cluster.member("attention-0").epoch


def test_an_arena_does_not_drain_alone(cluster: RunningCluster) -> None:
    """A Drain call that names an arena is refused, and says which worker to name."""
    with rpc.channel(cluster.controller.address, TlsConfig()) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            control.Drain(control_pb2.DrainRequest(worker_id="attention-0.1"), timeout=DEADLINE_S)
    assert isinstance(rpc.from_rpc(caught.value), InvalidRequest)
    assert "attention-0.1 is an arena of attention-0" in str(caught.value)


def test_a_second_cluster_is_refused(cluster: RunningCluster, folder: Path) -> None:
    """One state folder, one cluster; the refusal names the process that has it, and the way out."""
    with (
        running(configured(folder), joining()) as second,
        pytest.raises(AlreadyExists, match=f"process {os.getpid()}.*anabranch down"),
    ):
        second.status.result(DEADLINE_S)
    assert StateFolder(folder / "state").read().controller == cluster.controller.address


def test_nothing_listens_beyond_loopback(cluster: RunningCluster) -> None:
    """Ray's ports and ours are closed to other machines, and Ray's token lies in no file."""
    listeners = tcp_listeners(os.getpid(), *descendants(os.getpid()))
    assert {host for host, _ in listeners} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not (Path.home() / ".ray" / "auth_token").exists()


def test_a_role_does_not_see_rays_token(cluster: RunningCluster) -> None:
    """Role processes know nothing of Ray, and have the threads they were configured for."""
    process = cluster.member("dense-0").process_id
    environment = Path(f"/proc/{process}/environ").read_text().split("\0")
    assert not [entry for entry in environment if entry.startswith("RAY_")]
    assert "OMP_NUM_THREADS=1" in environment
