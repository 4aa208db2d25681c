"""`AttentionService`: who may open a lane, over which transport, and the gRPC lane itself."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import grpc

from anabranch.v1 import attention_pb2, attention_pb2_grpc, types_pb2
from anabranch.wire import geometry_message
from cluster import rpc
from cluster.errors import Fenced, InvalidRequest, LaneBroken, Unavailable, VersionMismatch
from cluster.types import LAYOUT_VERSION, WIRE_VERSION
from workers.attention.store import Store
from workers.lanes.codec import FrameCodec
from workers.lanes.grpc_link import TICKET_METADATA, parts
from workers.lanes.host_identity import host_identity
from workers.lanes.serve import LaneEnd, LaneSession
from workers.lanes.server import LaneServer


@dataclass(frozen=True, slots=True)
class LaneOffers:
    """The transports a worker serves: number -> address, and the most rows of a message."""

    addresses: Mapping[attention_pb2.LaneTransport.ValueType, str]
    rows_most: int


class LaneService(attention_pb2_grpc.AttentionServiceServicer):
    """Negotiates lanes onto a `LaneServer`; each lane gets a session of its own."""

    def __init__(
        self,
        store: Store,
        session: Callable[[], LaneSession],
        lanes: LaneServer,
        offers: LaneOffers,
    ) -> None:
        self._store = store
        self._session = session
        self._lanes = lanes
        self._offers = offers
        self._identity = host_identity()

    @rpc.unary
    def OpenLane(  # the name of the RPC
        self,
        request: attention_pb2.OpenLaneRequest,
        context: grpc.ServicerContext,
    ) -> attention_pb2.OpenLaneResponse:
        """Check versions and geometry, choose a transport, and expect the connection."""
        self._check(request)
        transport = self._choose(request)
        incarnation = secrets.randbits(64)
        codec = FrameCodec(self._store.geometry, incarnation, self._offers.rows_most)
        session = self._session()
        ticket = self._lanes.expect(LaneEnd(incarnation, codec, session, session.straight))
        return attention_pb2.OpenLaneResponse(
            responder=types_pb2.Responder(worker_id=self._store.worker, epoch=self._store.epoch),
            transport=transport,
            address=self._offers.addresses[transport],
            incarnation=incarnation,
            ticket=ticket,
        )

    @rpc.stream
    def StreamLane(  # the name of the RPC
        self, request: Iterable[attention_pb2.StreamLaneRequest], context: grpc.ServicerContext
    ) -> Iterator[attention_pb2.StreamLaneResponse]:
        """Serve a lane on this call's thread until the caller ends it."""
        ticket = _ticket(context)
        for reply in self._lanes.serve_stream(ticket, (item.payload for item in request)):
            for part in parts(reply):
                yield attention_pb2.StreamLaneResponse(payload=part)

    def _check(self, request: attention_pb2.OpenLaneRequest) -> None:
        """Raise what the two sides disagree about, by name."""
        _compare("wire_version", request.wire_version, WIRE_VERSION)
        _compare("layout_version", request.layout_version, LAYOUT_VERSION)
        own = geometry_message(self._store.geometry)
        for field in own.DESCRIPTOR.fields:
            _compare(
                f"geometry.{field.name}", getattr(request.geometry, field.name), getattr(own, field.name)
            )
        if request.believed.epoch not in (0, self._store.epoch):
            raise Fenced(f"{self._store.worker} was restarted: epoch {request.believed.epoch:016x} is over")
        if self._store.draining:
            raise Unavailable(f"{self._store.worker} is draining; open lanes elsewhere")

    def _choose(self, request: attention_pb2.OpenLaneRequest) -> attention_pb2.LaneTransport.ValueType:
        """The caller's first transport that is served here and can reach this process."""
        local = attention_pb2.LANE_TRANSPORT_LOCAL
        same_host = bool(self._identity) and request.host_identity == self._identity
        for transport in request.transports:
            if transport in self._offers.addresses and (transport != local or same_host):
                return transport
        raise InvalidRequest(
            f"{self._store.worker} serves none of the lane transports asked for; see lanes.transports"
        )


def _compare(field: str, theirs: object, ours: object) -> None:
    if theirs != ours:
        raise VersionMismatch(f"{field} differs: the caller has {theirs}, this attention worker {ours}")


def _ticket(context: grpc.ServicerContext) -> bytes:
    for key, value in context.invocation_metadata() or ():
        if key == TICKET_METADATA:
            try:
                return bytes.fromhex(str(value))
            except ValueError:
                raise LaneBroken("the lane's ticket is no hexadecimal number") from None
    raise LaneBroken(f"a lane needs its ticket in the metadata {TICKET_METADATA}")
