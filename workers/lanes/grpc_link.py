"""Lanes over a gRPC stream: the universal transport, slower by copies and threads, with gRPC's TLS."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grpc

from anabranch.v1 import attention_pb2, attention_pb2_grpc
from cluster import rpc
from cluster.errors import AnabranchError, LaneBroken

TICKET_METADATA = "anabranch-lane"
"""Carries the ticket, in hexadecimal."""

PART_BYTES_MOST = 2**20
_PARTS_MOST = 256
_PAUSE_S = 1.0


class _Stream(Protocol):
    """What we use of a grpc call."""

    def __iter__(self) -> Iterator[attention_pb2.StreamLaneResponse]: ...
    def cancel(self) -> bool: ...


class GrpcLink:
    """The dense side of `StreamLane` as a `ByteLink`.

    gRPC consumes requests and delivers responses on threads of its own; a bounded queue of parts each
    way joins them to the lane's thread.
    """

    def __init__(self, channel: grpc.Channel, ticket: bytes) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._closed = threading.Event()
        self._outgoing: queue.Queue[bytes] = queue.Queue(_PARTS_MOST)
        self._incoming: queue.Queue[bytes | AnabranchError] = queue.Queue(_PARTS_MOST)
        self._rest = memoryview(b"")
        stub = attention_pb2_grpc.AttentionServiceStub(channel)
        metadata = ((TICKET_METADATA, ticket.hex()),)
        self._call: _Stream = stub.StreamLane(self._requests(), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name="grpc-lane", daemon=True)
        self._reader.start()

    def write(
        self,
        buffers: Sequence[memoryview],
        deadline_s: float,
        on_readable: Callable[[], None] | None,  # noqa: ARG002  # a thread of its own reads
    ) -> None:
        """See `ByteLink.write`."""
        data = b"".join(buffers)
        for part in parts(data):
            if self._closed.is_set():
                raise LaneBroken("the lane is closed")
            try:
                self._outgoing.put(part, timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Full:
                raise LaneBroken("the other side of the lane takes no bytes") from None
        self.bytes_sent += len(data)

    def read_into(self, target: memoryview, deadline_s: float) -> int:
        """See `ByteLink.read_into`."""
        if not self._rest:
            try:
                part = self._incoming.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                return 0
            if isinstance(part, AnabranchError):
                raise LaneBroken(f"the lane broke: {part.message}") from part
            self._rest = memoryview(part)
        count = min(len(self._rest), len(target))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self.bytes_received += count
        return count

    def shut_down(self) -> None:
        """See `ByteLink.shut_down`."""
        self.close()

    def close(self) -> None:
        """See `ByteLink.close`."""
        self._closed.set()
        self._call.cancel()

    def _requests(self) -> Iterator[attention_pb2.StreamLaneRequest]:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):  # look again whether the lane was closed
                yield attention_pb2.StreamLaneRequest(payload=self._outgoing.get(timeout=_PAUSE_S))

    def _read(self) -> None:
        end: AnabranchError = LaneBroken("the other side closed the lane")
        try:
            for response in self._call:
                self._deliver(response.payload)
        except grpc.RpcError as error:
            end = rpc.from_rpc(error)
        self._closed.set()
        self._deliver(end)

    def _deliver(self, item: bytes | AnabranchError) -> None:
        """Hand to the lane's thread. One that asks for replies and never reads them is given up."""
        while True:
            try:
                self._incoming.put(item, timeout=_PAUSE_S)
            except queue.Full:
                if self._closed.is_set():
                    return
            else:
                return


def parts(data: bytes) -> Iterator[bytes]:
    """The data in pieces a gRPC message may carry."""
    for start in range(0, len(data), PART_BYTES_MOST):
        yield data[start : start + PART_BYTES_MOST]
