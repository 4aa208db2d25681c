"""One multiplexed stream from this gateway to one life of one dense worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from anabranch.v1 import dense_pb2, dense_pb2_grpc, inference_pb2, types_pb2
from cluster import rpc
from cluster.config import Config
from cluster.errors import AnabranchError, Unavailable, VersionMismatch
from cluster.telemetry import logger
from cluster.types import WIRE_VERSION, Epoch, WorkerId

_log = logger("gateway.link")

_HELLO_TIMEOUT_S = 5.0
_RETRY_FIRST_S = 0.1
_RETRY_MOST_S = 2.0
_OUTBOX_MESSAGES = 8192
"""More unsent messages than this mean that the worker does not read: the stream is given up."""

_Stream = grpc.aio.StreamStreamCall[dense_pb2.ServeRequest, dense_pb2.ServeResponse]


@dataclass(frozen=True, slots=True)
class GatewayIdentity:
    """Who this gateway is towards dense workers."""

    worker_id: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class LinkEvents:
    """Where a link reports; called on the event loop, and must not block."""

    on_ready: Callable[[DenseLink], None]
    on_step: Callable[[DenseLink, dense_pb2.StepDeltas], None]
    on_broken: Callable[[DenseLink, AnabranchError], None]


class DenseLink:
    """Keeps the stream to one incarnation open until closed.

        connecting --hello exchanged--> ready --stream ends, outbox full--> broken
            ^                                                                 |
            +---------------------- pause, doubling to 2 s -------------------+
        any --close--> closed

    `open_sequences` counts what this gateway has running there; the router keeps it.
    """

    def __init__(
        self, member: inference_pb2.Member, identity: GatewayIdentity, config: Config, events: LinkEvents
    ) -> None:
        self.worker_id = WorkerId(member.worker_id)
        self.epoch = Epoch(member.epoch)
        self.ready = False
        self.member = member
        self.hands_over = False
        """It drains: what it had came back, and nothing new is sent to it in this life."""
        self.open_sequences = 0
        self._identity = identity
        self._events = events
        self._outbox: asyncio.Queue[dense_pb2.ServeRequest] = asyncio.Queue(_OUTBOX_MESSAGES)
        silence_ms = config.controller.expiry_ms  # a stream whose worker says nothing breaks, heard of or not
        self._channel = rpc.aio_channel(member.address, config.security.tls, silence_ms=silence_ms)
        self._stream: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._keep_open(), name=f"link {self.worker_id}")

    @property
    def usable(self) -> bool:
        """Whether new sequences may be sent."""
        draining = self.member.state == inference_pb2.MEMBER_STATE_DRAINING
        return self.ready and not self.hands_over and not draining

    @property
    def load(self) -> tuple[int, int, str]:
        """What to sort by. A report lags behind and covers other gateways; the own count does neither."""
        reported = self.member.load.sequences_running + self.member.load.sequences_waiting
        return max(self.open_sequences, reported), self.open_sequences, self.worker_id

    def send(self, message: dense_pb2.ServeRequest) -> None:
        """Send in order, without waiting. On a link that is not ready the message is lost, as it would be
        on a stream about to break: whoever sends learns from `on_broken`.
        """
        if not self.ready:
            return
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            _log.warning("dense_does_not_read", dense=self.worker_id)
            if self._stream is not None:
                self._stream.cancel()

    async def close(self) -> None:
        """Give the connection up. Idempotent."""
        self.ready = False
        tasks = [task for task in (self._task, self._stream) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._channel.close()

    async def _keep_open(self) -> None:
        pause_s = _RETRY_FIRST_S
        while True:
            self._stream = asyncio.create_task(self._serve())
            try:
                await asyncio.wait([self._stream])
            finally:
                self._stream.cancel()
            if self.ready:
                pause_s = _RETRY_FIRST_S
            self._break(_ending(self._stream))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MOST_S)

    def _break(self, error: AnabranchError) -> None:
        was_ready, self.ready = self.ready, False
        self._outbox = asyncio.Queue(_OUTBOX_MESSAGES)
        _log.info("link_broken", dense=self.worker_id, was_ready=was_ready, problem=error.message)
        if was_ready:
            self._events.on_broken(self, error)

    async def _serve(self) -> None:
        """One stream, from hello to its end, which is always an exception."""
        stream: _Stream = dense_pb2_grpc.DenseServiceStub(self._channel).Serve()
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                await stream.write(self._hello())
                self._check_hello(_require(await stream.read()))
            writer = asyncio.create_task(self._write(stream, self._outbox))
            self.ready = True
            _log.info("link_ready", dense=self.worker_id, dense_epoch=f"{self.epoch:016x}")
            self._events.on_ready(self)
            while True:
                message = _require(await stream.read())
                if message.WhichOneof("message") == "step":
                    self._events.on_step(self, message.step)
        except grpc.RpcError as error:
            raise rpc.from_rpc(error) from error
        finally:
            if writer is not None:
                writer.cancel()
            stream.cancel()

    async def _write(self, stream: _Stream, outbox: asyncio.Queue[dense_pb2.ServeRequest]) -> None:
        while True:
            message = await outbox.get()
            try:
                await stream.write(message)
            except (grpc.RpcError, asyncio.InvalidStateError) as error:
                _log.debug("write_failed", dense=self.worker_id, problem=str(error))
                return  # the reader of the same stream ends with the reason

    def _hello(self) -> dense_pb2.ServeRequest:
        hello = dense_pb2.GatewayHello(
            gateway_id=self._identity.worker_id,
            gateway_epoch=self._identity.epoch,
            believed=types_pb2.Believed(epoch=self.epoch),
            wire_version=WIRE_VERSION,
        )
        return dense_pb2.ServeRequest(hello=hello)

    def _check_hello(self, message: dense_pb2.ServeResponse) -> None:
        hello = message.hello
        if hello.responder.epoch != self.epoch or hello.wire_version != WIRE_VERSION:
            raise VersionMismatch(
                f"{self.worker_id} answered as epoch {hello.responder.epoch:016x}, wire version "
                f"{hello.wire_version}; expected {self.epoch:016x}, {WIRE_VERSION}"
            )


def _require(message: object) -> dense_pb2.ServeResponse:
    """A message read, not the stream's end."""
    if not isinstance(message, dense_pb2.ServeResponse):
        raise Unavailable("the dense worker ended the stream")
    return message


def _ending(stream: asyncio.Task[None]) -> AnabranchError:
    """Why a stream's task is over."""
    if stream.cancelled():
        return Unavailable("the dense worker does not read its stream")
    error = stream.exception()
    if isinstance(error, AnabranchError):
        return error
    if isinstance(error, TimeoutError):
        return Unavailable(f"the dense worker did not say hello within {_HELLO_TIMEOUT_S:g} s")
    _log.error("link_failed", error=error)
    return Unavailable(f"the stream to the dense worker failed: {error!r}")
