"""How a dense worker opens a lane: negotiate over gRPC, connect, show the ticket."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from anabranch.v1 import attention_pb2, attention_pb2_grpc, types_pb2
from anabranch.wire import geometry_message
from cluster import rpc
from cluster.errors import LaneBroken, Unavailable
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, KvGeometry, WorkerId
from workers.lanes.agreement import TRANSPORTS
from workers.lanes.codec import FrameCodec
from workers.lanes.framed import FramedLane
from workers.lanes.grpc_link import GrpcLink
from workers.lanes.host_identity import host_identity
from workers.lanes.link import ByteLink
from workers.lanes.sockets import CONNECT_TIMEOUT_S, connect_tcp, connect_unix


@dataclass(frozen=True, slots=True)
class Caller:
    """Who opens lanes, and over what: the same for every attention worker."""

    dense_id: WorkerId
    dense_epoch: Epoch
    geometry: KvGeometry
    transports: Sequence[str]
    rows_most: int
    spin_s: float = 0.0
    """How long a lane over a socket asks for a reply before it sleeps."""


def dial(channel: grpc.Channel, address: str, epoch: Epoch, caller: Caller) -> FramedLane:
    """Open a lane to the attention worker whose gRPC server is at `address` (host:port).

    A transport that was agreed on but does not connect is left out and the rest is tried. Raises
    VersionMismatch naming the field that differs, Fenced for another epoch, ResourceExhausted, Unavailable.
    """
    stub = attention_pb2_grpc.AttentionServiceStub(channel)
    transports = [TRANSPORTS[name] for name in caller.transports]
    problem: LaneBroken | None = None
    while transports:
        request = _request(epoch, caller, transports)
        try:
            offer = stub.OpenLane(request, timeout=CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            raise rpc.from_rpc(error) from error
        try:
            link = _connect(channel, address, offer, caller.spin_s)
            break
        except LaneBroken as error:
            problem = error
            transports.remove(offer.transport)
    else:
        raise Unavailable(
            f"no lane to {address}: {problem.message if problem else 'no transport'}"
        ) from problem
    return FramedLane(link, FrameCodec(caller.geometry, offer.incarnation, caller.rows_most))


def _request(
    epoch: Epoch, caller: Caller, transports: Sequence[attention_pb2.LaneTransport.ValueType]
) -> attention_pb2.OpenLaneRequest:
    return attention_pb2.OpenLaneRequest(
        believed=types_pb2.Believed(epoch=epoch),
        dense_id=caller.dense_id,
        dense_epoch=caller.dense_epoch,
        wire_version=WIRE_VERSION,
        layout_version=LAYOUT_VERSION,
        geometry=geometry_message(caller.geometry),
        host_identity=host_identity(),
        transports=transports,
    )


def _connect(
    channel: grpc.Channel, address: str, offer: attention_pb2.OpenLaneResponse, spin_s: float
) -> ByteLink:
    if offer.transport == attention_pb2.LANE_TRANSPORT_GRPC:
        return GrpcLink(channel, offer.ticket)
    if offer.transport == attention_pb2.LANE_TRANSPORT_LOCAL:
        link = connect_unix(offer.address, spin_s)
    else:
        # The worker may listen on a wildcard; the host that answers gRPC is the one that listens.
        link = connect_tcp(_host(address), int(offer.address.rpartition(":")[2]), spin_s)
    link.write([memoryview(offer.ticket)], time.monotonic() + CONNECT_TIMEOUT_S, None)
    return link


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
