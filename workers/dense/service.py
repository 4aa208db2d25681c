"""`DenseService`: one multiplexed stream per gateway. Its threads carry messages and compute nothing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc

from anabranch import wire
from anabranch.v1 import dense_pb2, dense_pb2_grpc, types_pb2
from cluster import rpc
from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError, Fenced, InvalidRequest, ResourceExhausted, VersionMismatch
from cluster.telemetry import logger
from cluster.types import WIRE_VERSION, Epoch, WorkerId
from workers.dense.admission import AdmissionLimits, check
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.wire import read_submission, refusal, step_message

_log = logger("dense.service")

_STEPS_HELD_MOST = 4096
"""Steps kept for a gateway that does not read; a gateway further behind is cut off."""

_OFFER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this dense worker is."""

    worker: WorkerId
    epoch: Epoch
    model_digest: str


class GatewayStream:
    """Deltas on their way to one gateway: a bounded queue between the engine and the call's thread.

    open --overflow--> cut: the call ends with RESOURCE_EXHAUSTED
         --close-----> closed: the call ends
    """

    def __init__(self, gateway_id: str, steps_held_most: int = _STEPS_HELD_MOST) -> None:
        self.gateway_id = gateway_id
        self._steps_held_most = steps_held_most
        self._steps: deque[tuple[int, Sequence[Delta]]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_cut = False

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:
        """See `Subscriber`: never waits. What comes after the end is dropped; its sequences are orphans."""
        with self._changed:
            if self._is_closed or self._is_cut:
                return
            if len(self._steps) >= self._steps_held_most:
                self._is_cut = True
                _log.warning("gateway_cut_off", gateway=self.gateway_id, steps=len(self._steps))
            else:
                self._steps.append((step, deltas))
            self._changed.notify_all()

    def close(self) -> None:
        """The call is over. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def messages(self) -> Iterator[dense_pb2.ServeResponse]:
        """Each step's message until the stream is closed. Raises ResourceExhausted when it was cut."""
        while True:
            with self._changed:
                # Bounded by the call: its end, noticed by keep-alive at the latest, closes the stream.
                self._changed.wait_for(lambda: bool(self._steps) or self._is_closed or self._is_cut)
                if self._is_cut:
                    raise ResourceExhausted("the gateway does not read its stream: cut off")
                if not self._steps:
                    return
                step, deltas = self._steps.popleft()
            yield step_message(step, deltas)


class DenseService(dense_pb2_grpc.DenseServiceServicer):
    """Serves one engine."""

    def __init__(
        self,
        engine: Engine,
        identity: Identity,
        limits: AdmissionLimits,
        default_deadline_ms: int,
        clock: Clock = monotonic,
    ) -> None:
        self._engine = engine
        self._identity = identity
        self._limits = limits
        self._default_deadline_ms = default_deadline_ms
        self._clock = clock

    @rpc.stream
    def Serve(  # the name of the RPC
        self, request_iterator: Iterator[dense_pb2.ServeRequest], context: grpc.ServicerContext
    ) -> Iterator[dense_pb2.ServeResponse]:
        """Greet, then requests go to the engine from a thread of their own and deltas leave on this one."""
        hello = self._check_hello(next(request_iterator, None))
        stream = GatewayStream(hello.gateway_id)
        context.add_callback(stream.close)
        reader = threading.Thread(
            target=self._read, args=(request_iterator, stream), name=f"from {hello.gateway_id}", daemon=True
        )
        reader.start()
        _log.info("gateway_connected", gateway=hello.gateway_id, gateway_epoch=f"{hello.gateway_epoch:016x}")
        try:
            yield self._hello()
            yield from stream.messages()
        finally:
            stream.close()
            self._engine.disconnect(stream)
            _log.info("gateway_disconnected", gateway=hello.gateway_id)

    def _check_hello(self, message: dense_pb2.ServeRequest | None) -> dense_pb2.GatewayHello:
        if message is None or message.WhichOneof("message") != "hello":
            raise InvalidRequest("a gateway's first message is hello")
        hello = message.hello
        if hello.believed.epoch not in (0, self._identity.epoch):
            raise Fenced(f"{self._identity.worker} was restarted: epoch {hello.believed.epoch:016x} is over")
        if hello.wire_version != WIRE_VERSION:
            raise VersionMismatch(
                f"wire_version differs: the gateway has {hello.wire_version}, this dense worker {WIRE_VERSION}"
            )
        return hello

    def _hello(self) -> dense_pb2.ServeResponse:
        responder = types_pb2.Responder(worker_id=self._identity.worker, epoch=self._identity.epoch)
        hello = dense_pb2.DenseHello(
            responder=responder, wire_version=WIRE_VERSION, model_digest=self._identity.model_digest
        )
        return dense_pb2.ServeResponse(hello=hello)

    def _read(self, requests: Iterator[dense_pb2.ServeRequest], stream: GatewayStream) -> None:
        """Hand each request to the engine, in order, until the gateway hangs up."""
        try:
            for request in requests:
                self._handle(request, stream)
        except grpc.RpcError as error:
            _log.debug("gateway_hung_up", gateway=stream.gateway_id, problem=str(error))
        except Exception as error:  # noqa: BLE001  the gateway must not wait for a thread that died
            _log.error("gateway_stream_failed", error=error, gateway=stream.gateway_id)
        finally:
            stream.close()

    def _handle(self, request: dense_pb2.ServeRequest, stream: GatewayStream) -> None:
        match request.WhichOneof("message"):
            case "submission":
                self._submit(request.submission, stream)
            case "abort":
                key = wire.sequence_key(request.abort.sequence)
                self._engine.abort(key, request.abort.generation, _OFFER_TIMEOUT_S)
            case "acknowledge":
                key = wire.sequence_key(request.acknowledge.sequence)
                self._engine.acknowledge(key, request.acknowledge.generation, _OFFER_TIMEOUT_S)
            case other:
                raise InvalidRequest(f"a gateway does not send {other}")

    def _submit(self, message: dense_pb2.Submission, stream: GatewayStream) -> None:
        try:
            submission = read_submission(message, self._default_deadline_ms, self._clock)
            check(submission, self._limits)
            self._engine.submit(submission, stream, _OFFER_TIMEOUT_S)
        except AnabranchError as error:
            stream.deliver(0, [refusal(message, error)])
