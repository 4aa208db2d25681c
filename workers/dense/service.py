"""`DenseService`: one multiplexed stream per gateway. Its threads hand over; they never compute."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import grpc

from anabranch.v1 import dense_pb2, dense_pb2_grpc, types_pb2
from anabranch.wire import sequence_key, sequence_message
from cluster import rpc
from cluster.clock import Clock, monotonic
from cluster.errors import (
    AnabranchError,
    EngineFailed,
    Fenced,
    InvalidRequest,
    Unavailable,
    VersionMismatch,
)
from cluster.fault_points import reach
from cluster.telemetry import logger
from cluster.types import WIRE_VERSION, SequenceKey, WorkerId
from workers.dense.admission import AdmissionLimits, check
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.messages import refusal, step_message, submission_value

_log = logger("dense.service")

_OUTBOX_STEPS = 1024
"""Steps a gateway may fall behind before it is cut off; it resumes its sequences on a new stream."""

_HAND_OVER_S = 5.0


@dataclass(frozen=True, slots=True)
class Identity:
    """What a dense worker says of itself."""

    responder: types_pb2.Responder
    model_digest: str


class GatewayStream:
    """One gateway's place: steps' deltas wait here until its stream takes them (a `Subscriber`).

        open --the gateway reads too slowly, hangs up, or ends--> closed

    A closed stream takes nothing more; the engine keeps its sequences as orphans for a while.
    """

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self._steps: queue.Queue[tuple[int, Sequence[Delta]] | None] = queue.Queue(_OUTBOX_STEPS)
        self._closed = threading.Event()

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:
        """See `Subscriber`. A gateway that does not read is cut off, never waited for."""
        if self._closed.is_set():
            return
        try:
            self._steps.put_nowait((step, deltas))
        except queue.Full:
            _log.warning("gateway_too_slow", gateway=self.gateway, step=step)
            self.close()

    def close(self) -> None:
        """Take nothing more and end the stream now. Idempotent."""
        self._closed.set()
        self.end()

    def end(self) -> None:
        """End the stream once the gateway has what waits for it."""
        try:
            self._steps.put_nowait(None)
        except queue.Full:
            self._closed.set()  # the stream's thread is busy sending, and looks at this next

    def messages(self) -> Iterator[dense_pb2.ServeResponse]:
        """What the gateway is to get, until the stream is over: by `end`, or by the call's own end, which
        keep-alive notices at the latest.
        """
        while not self._closed.is_set():
            item = self._steps.get()
            if item is None:
                return
            yield step_message(*item)
            reach("sent-recorded")


class DenseService(dense_pb2_grpc.DenseServiceServicer):
    """Brings gateways' messages to the engine and the engine's deltas to gateways. Where the engine fails all
    streams end, and say so: what was on them is resubmitted elsewhere, as after a death.
    """

    def __init__(
        self, engine: Engine, identity: Identity, limits: AdmissionLimits, clock: Clock = monotonic
    ) -> None:
        self._engine = engine
        self._identity = identity
        self._limits = limits
        self._clock = clock
        self._streams: set[GatewayStream] = set()
        engine.failed.add_done_callback(lambda _failed: self.end_streams())

    def end_streams(self) -> None:
        """Let every gateway have what waits for it, and end its stream."""
        for stream in list(self._streams):
            stream.end()

    @rpc.stream
    def Serve(
        self, requests: Iterator[dense_pb2.ServeRequest], context: grpc.ServicerContext
    ) -> Iterator[dense_pb2.ServeResponse]:
        """See dense.proto."""
        stream = GatewayStream(self._greet(requests))
        if not context.add_callback(stream.close):
            return
        self._streams.add(stream)
        try:
            self._require_engine()
            yield self._hello()
            reader = threading.Thread(
                target=self._read, args=(requests, stream), name=f"from-{stream.gateway}", daemon=True
            )
            reader.start()
            _log.info("gateway_connected", gateway=stream.gateway)
            yield from stream.messages()
            self._require_engine()
        finally:
            stream.close()
            self._streams.discard(stream)
            self._engine.disconnect(stream)
            _log.info("gateway_disconnected", gateway=stream.gateway)

    @rpc.unary
    def Handover(
        self, request: dense_pb2.HandoverRequest, _context: grpc.ServicerContext
    ) -> dense_pb2.HandoverResponse:
        """See dense.proto."""
        self._check_epoch(request.believed.epoch)
        here = self._identity.responder
        if request.target == here.worker_id:
            raise InvalidRequest(f"{request.target} cannot take over from itself: name another dense worker")
        handed: Future[list[SequenceKey]] = Future()
        keys = [sequence_key(sequence) for sequence in request.sequences]
        self._engine.hand_over(keys, WorkerId(request.target) or None, handed.set_result)
        try:
            left = handed.result(_HAND_OVER_S)
        except TimeoutError:
            raise Unavailable(f"{here.worker_id} did not answer in {_HAND_OVER_S:g} s") from None
        return dense_pb2.HandoverResponse(responder=here, sequences=map(sequence_message, left))

    def _check_epoch(self, epoch: int) -> None:
        if epoch not in (0, self._identity.responder.epoch):
            raise Fenced(f"{self._identity.responder.worker_id} was restarted: epoch {epoch:016x} is over")

    def _require_engine(self) -> None:
        if self._engine.failed.done():
            name = self._identity.responder.worker_id
            raise EngineFailed(f"the engine of {name} failed: {self._engine.failed.result()}")

    def _greet(self, requests: Iterator[dense_pb2.ServeRequest]) -> str:
        """Check the first message; returns the gateway's name."""
        first = next(requests, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidRequest("the first message of a stream is `hello`")
        hello = first.hello
        if hello.wire_version != WIRE_VERSION:
            raise VersionMismatch(f"wire version {hello.wire_version} speaks to {WIRE_VERSION}")
        self._check_epoch(hello.believed.epoch)
        return hello.gateway_id

    def _hello(self) -> dense_pb2.ServeResponse:
        hello = dense_pb2.DenseHello(
            responder=self._identity.responder,
            wire_version=WIRE_VERSION,
            model_digest=self._identity.model_digest,
        )
        return dense_pb2.ServeResponse(hello=hello)

    def _read(self, requests: Iterator[dense_pb2.ServeRequest], stream: GatewayStream) -> None:
        """Hand messages over until the gateway ends or breaks its stream. The last may be a submission that
        comes behind the stream's end, and its sequence nobody's: so the engine hears of the end once more.
        """
        try:
            for request in requests:
                self._take(request, stream)
        except grpc.RpcError as error:
            _log.info("gateway_broke", gateway=stream.gateway, problem=str(error))
        except AnabranchError as error:
            _log.warning("gateway_refused", gateway=stream.gateway, problem=error.message)
        finally:
            stream.close()
            self._engine.disconnect(stream)

    def _take(self, request: dense_pb2.ServeRequest, stream: GatewayStream) -> None:
        match request.WhichOneof("message"):
            case "submission":
                self._submit(request.submission, stream)
            case "abort":
                abort = request.abort
                self._engine.abort(sequence_key(abort.sequence), abort.generation, _HAND_OVER_S)
            case "acknowledge":
                done = request.acknowledge
                self._engine.acknowledge(sequence_key(done.sequence), done.generation, _HAND_OVER_S)
            case other:
                raise InvalidRequest(f"{other or 'an empty message'} is not expected here")

    def _submit(self, message: dense_pb2.Submission, stream: GatewayStream) -> None:
        try:
            submission = submission_value(message, self._clock(), self._limits.deadline_most_ms)
            check(submission, self._limits)
            self._engine.submit(submission, stream, _HAND_OVER_S)
        except AnabranchError as error:
            stream.deliver(0, [refusal(message, error)])
