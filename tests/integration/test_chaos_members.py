"""What each process under chaos is told of the others: ways through the network that can be cut."""

from __future__ import annotations

import contextlib

from anabranch.cli.chaos.network import Network
from anabranch.cli.chaos.seen_members import SeenMembers
from anabranch.v1 import control_pb2, inference_pb2
from cluster.types import LAYOUT_VERSION, WIRE_VERSION
from controller.membership import Terms

WORKERS = {"attention-0": 1, "dense-0": 2, "dense-1": 3}
"""Names, and what serves as epoch and as process id."""


def _registration(worker_id: str) -> control_pb2.RegisterRequest:
    number = WORKERS[worker_id]
    member = inference_pb2.Member(
        worker_id=worker_id,
        role=inference_pb2.ROLE_ATTENTION if number == 1 else inference_pb2.ROLE_DENSE,
        epoch=number,
        process_id=number,
        address=f"127.0.0.1:{number}",
    )
    return control_pb2.RegisterRequest(
        member=member, wire_version=WIRE_VERSION, layout_version=LAYOUT_VERSION, config_digest="any"
    )


def _told(table: SeenMembers, worker_id: str) -> dict[str, str]:
    """The addresses a worker hears that knows nothing yet."""
    news = table.heartbeat(control_pb2.HeartbeatRequest(worker_id=worker_id, epoch=WORKERS[worker_id]))
    assert news is not None
    return {member.worker_id: member.address for member in news.members}


def test_each_process_has_ways_of_its_own_and_they_stay() -> None:
    """Two that hear of the same membership, again and again, are each told their own ways and always the same
    ones: an address that changed would be a connection that is closed and opened anew. The table keeps the
    plain addresses.
    """
    with contextlib.closing(Network()) as network:
        table = SeenMembers(Terms("any", heartbeat_ms=100, expiry_ms=60_000), network)
        for worker_id in WORKERS:
            table.register(_registration(worker_id))
        first, other = (_told(table, worker_id) for worker_id in ("dense-0", "dense-1"))
        assert set(first.values()).isdisjoint(other.values())
        assert (_told(table, "dense-0"), _told(table, "dense-1")) == (first, other)
        plain = {member.worker_id: member.address for member in table.membership().members}
    assert plain == {worker_id: f"127.0.0.1:{number}" for worker_id, number in WORKERS.items()}
