"""A dense worker without a model: the real DenseService over real gRPC, its tokens from a script.

What a script says depends on prompt, seed, choice and output index alone, as a real model's tokens do:
whichever worker continues a sequence, the right continuation is the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import string
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from anabranch.v1 import dense_pb2, dense_pb2_grpc, inference_pb2, types_pb2
from cluster import rpc
from cluster.config import SecurityConfig
from cluster.errors import AlreadyExists, AnabranchError, Fenced
from cluster.types import WIRE_VERSION, draw_epoch
from tests.tokenizer import EOS_ID, build_tokenizer

LETTER_IDS = tuple(build_tokenizer().encode(string.ascii_lowercase).ids)

TIMINGS = types_pb2.Timings(queue_seconds=0.25, prefill_seconds=0.5, decode_seconds=1.5)
"""What every delta with tokens, and every end, says."""

Script = Callable[[dense_pb2.Submission, int], int | None]
"""The token of an output index, None for the model's end token."""


def letters(submission: dense_pb2.Submission, index: int) -> int | None:
    """Endless letters that look random."""
    return scripted_letters(
        tuple(submission.prompt_token_ids), submission.sampling.seed, submission.sequence.choice, index
    )


def scripted_letters(prompt: tuple[int, ...], seed: int, choice: int, index: int) -> int:
    """The letter at one index; what tests expect to see."""
    digest = hashlib.sha256(repr((prompt, seed, choice, index)).encode()).digest()
    return LETTER_IDS[digest[0] % len(LETTER_IDS)]


def says(text: str) -> Script:
    """A script that says `text`, then ends."""
    ids = build_tokenizer().encode(text).ids

    def script(_submission: dense_pb2.Submission, index: int) -> int | None:
        return ids[index] if index < len(ids) else None

    return script


@dataclass
class _Sequence:
    """One sequence in work, as the fake worker sees it."""

    submission: dense_pb2.Submission
    next_index: int
    map_sent: bool = False


@dataclass
class FakeDense:
    """One life of a dense worker. Everything it was told is kept in lists for tests to look at.

    `pause_at` holds every sequence at that output index; `refusal` answers each submission;
    `hangs_up` ends the stream at each submission; a stream it ends by itself ends with `last_word`.
    """

    name: str
    script: Script = letters
    step_s: float = 0.001
    tokens_per_step: int = 1
    pause_at: int | None = None
    refusal: AnabranchError | None = None
    hangs_up: bool = False
    last_word: AnabranchError | None = None
    serving: inference_pb2.Serving.ValueType = inference_pb2.SERVING_UNSPECIFIED
    submissions: list[dense_pb2.Submission] = field(default_factory=list)
    aborts: list[dense_pb2.AbortSequence] = field(default_factory=list)
    acknowledged: list[dense_pb2.Acknowledge] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.epoch = draw_epoch()
        self.port = 0
        self._streams: list[_Stream] = []
        self._server = grpc.aio.server(options=rpc.server_options())
        dense_pb2_grpc.add_DenseServiceServicer_to_server(_Service(self), self._server)

    async def start(self) -> FakeDense:
        """Serve on a free port."""
        self.port = rpc.bind(self._server, "127.0.0.1", 0, SecurityConfig())
        await self._server.start()
        return self

    async def die(self) -> None:
        """End without a word, mid-step; idempotent."""
        await self._server.stop(None)

    async def hang_up(self) -> None:
        """End every stream."""
        for stream in self._streams:
            await stream.outbox.put(None)

    async def hand_over(self, *, worker_stays: bool = False, to: str = "") -> None:
        """End every sequence with HANDOFF: drain, unless the `worker_stays`."""
        for stream in self._streams:
            await stream.hand_over(worker_stays, to)

    async def send(self, delta: dense_pb2.SequenceDelta) -> None:
        """Say something out of turn on every stream."""
        for stream in self._streams:
            await stream.send([delta])

    def member(
        self, state: inference_pb2.MemberState.ValueType = inference_pb2.MEMBER_STATE_READY
    ) -> inference_pb2.Member:
        """Its entry in the membership."""
        return inference_pb2.Member(
            worker_id=self.name,
            role=inference_pb2.ROLE_DENSE,
            epoch=self.epoch,
            address=f"127.0.0.1:{self.port}",
            state=state,
            serving=self.serving,
        )

    @property
    def paused(self) -> int:
        """Sequences that have reached `pause_at`."""
        return sum(stream.at(self.pause_at) for stream in self._streams)

    def opened(self, stream: _Stream) -> None:
        """A gateway connected."""
        self._streams.append(stream)


class _Service(dense_pb2_grpc.DenseServiceServicer):
    def __init__(self, worker: FakeDense) -> None:
        self._worker = worker

    @rpc.aio_stream
    async def Serve(
        self,
        request_iterator: AsyncIterator[dense_pb2.ServeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[dense_pb2.ServeResponse]:
        """See dense.proto."""
        hello = (await anext(request_iterator)).hello
        if hello.believed.epoch not in (0, self._worker.epoch):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another epoch")
        stream = _Stream(self._worker)
        self._worker.opened(stream)
        tasks = [
            asyncio.create_task(stream.step_for_ever()),
            asyncio.create_task(stream.read(request_iterator)),
        ]
        try:
            yield stream.hello()
            while (message := await stream.outbox.get()) is not None:
                yield message
            if self._worker.last_word is not None:
                raise self._worker.last_word
        finally:
            for task in tasks:
                task.cancel()


class _Stream:
    """One gateway's stream."""

    def __init__(self, worker: FakeDense) -> None:
        self._worker = worker
        self.outbox: asyncio.Queue[dense_pb2.ServeResponse | None] = asyncio.Queue(1024)
        self._sequences: dict[tuple[str, int], _Sequence] = {}
        self._steps = 0

    def hello(self) -> dense_pb2.ServeResponse:
        responder = types_pb2.Responder(worker_id=self._worker.name, epoch=self._worker.epoch)
        hello = dense_pb2.DenseHello(responder=responder, wire_version=WIRE_VERSION)
        return dense_pb2.ServeResponse(hello=hello)

    async def read(self, requests: AsyncIterator[dense_pb2.ServeRequest]) -> None:
        async for request in requests:
            await self._receive(request)
        await self.outbox.put(None)

    async def _receive(self, request: dense_pb2.ServeRequest) -> None:
        if request.HasField("submission"):
            await self._take(request.submission)
        elif request.HasField("abort"):
            self._worker.aborts.append(request.abort)
            self._drop(request.abort.sequence, request.abort.generation)
        elif request.HasField("acknowledge"):
            self._worker.acknowledged.append(request.acknowledge)

    async def step_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._worker.step_s)  # the time a step computes
            deltas = [delta for key in list(self._sequences) if (delta := self._advance(key)) is not None]
            if deltas:
                await self.send(deltas)

    def at(self, index: int | None) -> int:
        """Sequences whose next token is this one."""
        return sum(running.next_index == index for running in self._sequences.values())

    async def hand_over(self, worker_stays: bool, to: str) -> None:
        deltas = [
            dense_pb2.SequenceDelta(
                sequence=running.submission.sequence,
                generation=running.submission.generation,
                first_index=running.next_index,
                handoff=True,
                worker_stays=worker_stays,
                handoff_to=to,
            )
            for running in self._sequences.values()
        ]
        self._sequences.clear()
        await self.send(deltas)

    async def send(self, deltas: list[dense_pb2.SequenceDelta]) -> None:
        self._steps += 1
        step = dense_pb2.StepDeltas(step=self._steps, deltas=deltas)
        await self.outbox.put(dense_pb2.ServeResponse(step=step))

    async def _take(self, submission: dense_pb2.Submission) -> None:
        self._worker.submissions.append(submission)
        key = (submission.sequence.request_id, submission.sequence.choice)
        running = self._sequences.get(key)
        if self._worker.hangs_up:
            await self.outbox.put(None)
        elif self._worker.refusal is not None:
            await self._fail(submission, self._worker.refusal)
        elif running is not None and running.submission.generation >= submission.generation:
            kind = AlreadyExists if running.submission.generation == submission.generation else Fenced
            await self._fail(submission, kind("known already"))
        else:
            self._sequences[key] = _Sequence(submission, len(submission.output_token_ids))

    async def _fail(self, submission: dense_pb2.Submission, error: AnabranchError) -> None:
        failure = types_pb2.Failure(code=rpc.code_number(error), reason=error.reason, message=error.message)
        delta = dense_pb2.SequenceDelta(
            sequence=submission.sequence,
            generation=submission.generation,
            first_index=len(submission.output_token_ids),
            failure=failure,
        )
        await self.send([delta])

    def _drop(self, sequence: types_pb2.SequenceKey, generation: int) -> None:
        key = (sequence.request_id, sequence.choice)
        running = self._sequences.get(key)
        if running is not None and running.submission.generation <= generation:
            del self._sequences[key]

    def _advance(self, key: tuple[str, int]) -> dense_pb2.SequenceDelta | None:
        running, worker = self._sequences[key], self._worker
        submission, first_index = running.submission, running.next_index
        delta = dense_pb2.SequenceDelta(
            sequence=submission.sequence, generation=submission.generation, first_index=first_index
        )
        if not running.map_sent:
            running.map_sent = True
            delta.shard_map.CopyFrom(_shard_map(worker))
            return delta
        delta.timings.CopyFrom(TIMINGS)
        limit = submission.sampling.max_tokens
        if worker.pause_at is not None and limit > worker.pause_at:
            limit = max(worker.pause_at, first_index)
        while running.next_index < min(limit, first_index + worker.tokens_per_step):
            token = worker.script(submission, running.next_index)
            if token is None:
                self._end(key, delta, types_pb2.FINISH_REASON_STOP)
                delta.matched_token_id = EOS_ID
                return delta
            delta.token_ids.append(token)
            if submission.sampling.HasField("logprobs"):
                delta.logprobs.append(_logprobs(token, submission.sampling.logprobs))
            running.next_index += 1
        if running.next_index >= submission.sampling.max_tokens:
            self._end(key, delta, types_pb2.FINISH_REASON_LENGTH)
        return delta if running.next_index > first_index or delta.finish_reason else None

    def _end(
        self,
        key: tuple[str, int],
        delta: dense_pb2.SequenceDelta,
        reason: types_pb2.FinishReason.ValueType,
    ) -> None:
        delta.finish_reason = reason
        del self._sequences[key]


def _shard_map(worker: FakeDense) -> types_pb2.ShardMap:
    shard = types_pb2.ShardRef(worker_id="attention-0", epoch=7, shard_id=worker.port, end_position=64)
    return types_pb2.ShardMap(shards=[shard])


def _logprobs(token: int, alternatives: int) -> types_pb2.TokenLogprobs:
    best = [
        types_pb2.TokenLogprobs.Alternative(token_id=token + rank, logprob=-0.5 - rank)
        for rank in range(alternatives)
    ]
    return types_pb2.TokenLogprobs(logprob=-0.5, alternatives=best)
