"""A gateway whose output is a script: a real InferenceService over gRPC, with faults on demand.

Token i of choice c is `1000 c + i`, and its text the next of `WORDS`, so that a test knows every token and
character a client must get, once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from anabranch.v1 import inference_pb2 as api
from anabranch.v1 import inference_pb2_grpc, types_pb2
from cluster import errors, rpc
from cluster.config import SecurityConfig

WORDS = (" flows", " to", " the", " sea,", " divides", " and", " joins", " again:", " ein", " Fluß")
MODEL = "scripted"
CONTEXT = 4096
SERVICE = "anabranch.v1.InferenceService"
PATIENCE_S = 10.0


def tokens(count: int, choice: int = 0) -> list[int]:
    """The script's first tokens."""
    return [1000 * choice + index for index in range(count)]


def text(count: int, choice: int = 0) -> str:
    """The text of the script's first tokens."""
    return "".join(WORDS[(token % 1000 + choice) % len(WORDS)] for token in tokens(count, choice))


@dataclass
class Script:
    """How the gateway behaves; a test may change it between calls.

    `lag` tokens at the end of what was sent have no certain text yet; it comes with later ones or at the end.
    """

    delta_tokens: int = 1
    lag: int = 0
    repeat: int = 0
    """A resumed stream begins this many tokens too early."""

    skip: int = 0
    """A resumed stream begins this many tokens too late."""

    api_key: str | None = None
    refusal: errors.AnabranchError | None = None
    """Raised at the start of every generation."""

    break_after: list[int] = field(default_factory=list)
    """Responses after which a stream breaks with UNAVAILABLE, one entry per call; then no more."""

    end_after: int | None = None
    """Responses after which every stream ends as if all was well."""

    hold_after: int | None = None
    """Responses after which a stream waits until it is cut off."""


@dataclass
class _Live:
    """A stream being served."""

    ended: bool = False


class FakeGateway(inference_pb2_grpc.InferenceServiceServicer):
    """Serves on a loopback port until left; `requests` and `keys` are what it was sent."""

    def __init__(
        self,
        script: Script | None = None,
        security: SecurityConfig | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.script = script or Script()
        self.requests: list[api.GenerateRequest] = []
        self.held = threading.Event()
        self.hung_up = threading.Event()
        self._security = security or SecurityConfig()
        self._live: dict[str, _Live] = {}
        self._changed = threading.Condition()
        self._leaving = False
        self._server: grpc.Server | None = None
        self._host = host
        self.port = port

    @property
    def address(self) -> str:
        """Where it listens, or did."""
        return f"{'localhost' if self._security.tls.enabled else self._host}:{self.port}"

    def start(self) -> None:
        """Listen: on a free port at first, on the same one afterwards."""
        self._server = rpc.server(threads=16)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        servicer = health.HealthServicer()
        servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        self.port = rpc.bind(self._server, self._host, self.port, self._security)
        self._server.start()

    def kill(self) -> None:
        """Go away with all connections, at once."""
        if self._server is not None:
            self._server.stop(None).wait(PATIENCE_S)
            self._server = None

    def __enter__(self) -> FakeGateway:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self.kill()

    @rpc.stream
    def Generate(
        self, request: api.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[api.GenerateResponse]:
        """The script, with its faults."""
        self._admit(request, context)
        live = self._live[request.request_id] = _Live()
        context.add_callback(lambda: self._leave(request.request_id, live))
        break_after = self.script.break_after.pop(0) if self.script.break_after else None
        for count, response in enumerate(_responses(request, self.script)):
            if count == break_after:
                raise errors.Unavailable("broken as asked for")
            if count == self.script.end_after:
                return
            if count == self.script.hold_after:
                self.held.set()
                self._wait(live)
            yield response
        self._live.pop(request.request_id, None)

    @rpc.unary
    def Tokenize(self, request: api.TokenizeRequest, context: grpc.ServicerContext) -> api.TokenizeResponse:
        """One token per word."""
        self._check_key(context)
        words = " ".join([request.text, *(item.content for item in request.chat.messages)]).split()
        return api.TokenizeResponse(token_ids=range(len(words)), max_sequence_length=CONTEXT)

    @rpc.unary
    def ListModels(
        self, request: api.ListModelsRequest, context: grpc.ServicerContext
    ) -> api.ListModelsResponse:
        """The one model."""
        self._check_key(context)
        model = api.Model(
            name=MODEL,
            architecture="Script",
            max_sequence_length=CONTEXT,
            vocabulary_size=1000,
            parameters=len(WORDS),
        )
        return api.ListModelsResponse(models=[model])

    @rpc.unary
    def GetTopology(
        self, request: api.GetTopologyRequest, context: grpc.ServicerContext
    ) -> api.GetTopologyResponse:
        """This gateway alone, and a shard of the asked request."""
        member = api.Member(
            worker_id="gateway-0",
            role=api.ROLE_GATEWAY,
            epoch=7,
            address=self.address,
            state=api.MEMBER_STATE_READY,
            load=api.Load(blocks=api.BlockAccount(capacity=8, free=8), streams_open=len(self._live)),
        )
        answer = api.GetTopologyResponse(members=[member])
        if request.HasField("request_id"):
            if request.request_id not in self._live:
                raise errors.NotFound("no such live request")
            sequence = types_pb2.SequenceKey(request_id=request.request_id)
            answer.shards.add(sequence=sequence, shard=_shard_map(0).shards[0], committed_tokens=5, bytes=80)
        return answer

    @rpc.unary
    def Abort(self, request: api.AbortRequest, context: grpc.ServicerContext) -> api.AbortResponse:
        """End a live request."""
        live = self._live.pop(request.request_id, None)
        if live is not None:
            self._end(live)
        return api.AbortResponse(found=live is not None)

    def _admit(self, request: api.GenerateRequest, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self._check_key(context)
        if self.script.refusal:
            raise self.script.refusal
        if request.request_id in self._live and not request.HasField("resume"):
            raise errors.AlreadyExists(f"request {request.request_id} is live")

    def _check_key(self, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization")
        if self.script.api_key and given != f"Bearer {self.script.api_key}":
            raise errors.Unauthenticated("this API key is not known")

    def _leave(self, request_id: str, live: _Live) -> None:
        if self._live.get(request_id) is live:
            del self._live[request_id]
            self.hung_up.set()
        self._end(live)

    def _end(self, live: _Live) -> None:
        with self._changed:
            live.ended = True
            self._changed.notify_all()

    def _wait(self, live: _Live) -> None:
        """Until the client or an Abort ends the stream, or the test is over."""
        with self._changed:
            self._changed.wait_for(lambda: live.ended or self._leaving, PATIENCE_S)
        if live.ended:
            raise errors.Cancelled("the request was aborted")


def _responses(request: api.GenerateRequest, script: Script) -> Iterator[api.GenerateResponse]:
    """The whole stream of a request."""
    words = max(1, len(request.text.split()))
    generation = request.resume.generation or 1
    started = api.Started(model=MODEL, prompt_tokens=words, seed=request.sampling.seed, generation=generation)
    yield api.GenerateResponse(request_id=request.request_id, started=started)
    outputs = [_output(request, choice, script) for choice in range(request.n or 1)]
    while outputs:  # one delta of each choice in turn
        for output in list(outputs):
            response = next(output, None)
            if response is None:
                outputs.remove(output)
            else:
                response.request_id = request.request_id
                yield response


def _output(request: api.GenerateRequest, choice: int, script: Script) -> Iterator[api.GenerateResponse]:
    """One choice from where the client is."""
    length, matched = _length(request, choice)
    position = len(request.resume.received[choice].token_ids) if request.HasField("resume") else 0
    if request.HasField("resume"):
        position = max(0, position - script.repeat) + script.skip
    while position < length:
        end = min(length, position + script.delta_tokens)
        certain = [text(max(0, count - script.lag), choice) for count in (position, end)]
        delta = api.TokensDelta(
            choice=choice,
            first_index=position,
            token_ids=tokens(length, choice)[position:end],
            text=certain[1][len(certain[0]) :],
            logprobs=[types_pb2.TokenLogprobs(logprob=-1.0)] * (end - position)
            if request.sampling.HasField("logprobs")
            else [],
            shard_map=_shard_map(choice),
        )
        yield api.GenerateResponse(delta=delta)
        position = end
    rest = text(length, choice)[len(text(max(0, length - script.lag), choice)) :]
    if rest:
        yield api.GenerateResponse(delta=api.TokensDelta(choice=choice, first_index=length, text=rest))
    yield api.GenerateResponse(finished=_finished(choice, length, matched))


def _length(request: api.GenerateRequest, choice: int) -> tuple[int, str | None]:
    """Tokens of a choice, and the stop string that ends it."""
    for length in range(request.sampling.max_tokens):
        for stop in request.stop:
            if stop in text(length + 1, choice):
                return length, stop
    return request.sampling.max_tokens, None


def _finished(choice: int, length: int, matched: str | None) -> api.Finished:
    return api.Finished(
        choice=choice,
        reason=types_pb2.FINISH_REASON_LENGTH if matched is None else types_pb2.FINISH_REASON_STOP,
        matched_stop=matched,
        usage=api.Usage(prompt_tokens=2, completion_tokens=length),
        timings=types_pb2.Timings(decode_seconds=0.5),
    )


def _shard_map(choice: int) -> types_pb2.ShardMap:
    return types_pb2.ShardMap(
        shards=[types_pb2.ShardRef(worker_id=f"attention-{choice}", epoch=3, shard_id=1, end_position=64)]
    )
