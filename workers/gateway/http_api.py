"""The OpenAI-compatible HTTP API: the same desk as gRPC, other clothes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from anabranch.v1 import inference_pb2
from cluster.config import GatewayConfig
from cluster.errors import AnabranchError, Cancelled, Internal, NotFound
from cluster.telemetry import logger
from workers.gateway.callers import Caller
from workers.gateway.desk import Desk
from workers.gateway.http_answer import Answer, ChatFormat, CompletionFormat, Format, Json
from workers.gateway.http_errors import BodyTooLarge, error_body
from workers.gateway.http_schema import Body, ChatBody, CompletionBody, TokenizeBody, read_body
from workers.gateway.live_request import LiveRequest
from workers.gateway.metrics import GatewayMetrics
from workers.gateway.text_work import TextWork

_log = logger("gateway.http")

_Events = AsyncIterator[tuple[int, inference_pb2.GenerateResponse]]
_GenerationBody = CompletionBody | ChatBody
T = TypeVar("T")


class HttpApi:
    """The routes. Bodies are read and checked on a thread: they may be megabytes."""

    def __init__(
        self,
        desk: Desk,
        work: TextWork,
        metrics: GatewayMetrics,
        limits: GatewayConfig,
        ready: Callable[[], bool],
    ) -> None:
        self._desk = desk
        self._work = work
        self._metrics = metrics
        self._body_bytes_max = limits.max_request_bytes
        self._ready = ready
        self._started = int(time.time())

    def routes(self) -> list[Route]:
        """Everything this API answers."""
        return [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._exposition, methods=["GET"]),
        ]

    async def _completions(self, request: Request) -> Response:
        caller = self._caller(request)
        body = await self._body(request, CompletionBody)
        return await self._generate(request, caller, body, CompletionFormat(self._desk.model.tokenizer))

    async def _chat_completions(self, request: Request) -> Response:
        caller = self._caller(request)
        body = await self._body(request, ChatBody)
        return await self._generate(request, caller, body, ChatFormat(self._desk.model.tokenizer))

    async def _models(self, request: Request) -> Response:
        self._caller(request)
        return JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def _model(self, request: Request) -> Response:
        self._caller(request)
        if request.path_params["name"] != self._desk.model.name:
            raise NotFound(f"model {request.path_params['name']!r} is not served here: see /v1/models")
        return JSONResponse(self._model_entry())

    async def _tokenize(self, request: Request) -> Response:
        self._caller(request)
        body = await self._body(request, TokenizeBody)
        tokens = await self._desk.tokenize(body.request())
        longest = self._desk.model.max_sequence_length
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens})

    async def _health(self, _request: Request) -> Response:
        return Response(status_code=200 if self._ready() else 503)

    async def _exposition(self, _request: Request) -> Response:
        text = await self._work.run(lambda: generate_latest(self._metrics.registry))
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def _generate(
        self, request: Request, caller: Caller, body: _GenerationBody, form: Format
    ) -> Response:
        with self._metrics.counting_refusals():
            requests = body.requests()
        lives = await self._open(requests, caller)
        try:
            answer = Answer(form, self._desk.model.name, lives[0].plan.request_id, len(lives), body.n or 1)
            events = merged(lives)
            if not body.stream:
                await unless_disconnected(request, _collect(answer, events))
                return JSONResponse(answer.whole())
            # Until the first token it can still become an HTTP status, instead of an error in a stream.
            head = await unless_disconnected(request, _head(events))
        except BaseException:
            _close(lives)
            raise
        return _EventStream(_server_sent(answer, body, head, events), partial(_close, lives))

    async def _open(
        self, requests: Sequence[inference_pb2.GenerateRequest], caller: Caller
    ) -> list[LiveRequest]:
        """All or none."""
        lives: list[LiveRequest] = []
        try:
            for request in requests:
                live = await self._desk.open(request, caller, None)
                lives.append(live)
        except BaseException:
            _close(lives)
            raise
        return lives

    async def _body(self, request: Request, shape: type[Body]) -> Body:
        with self._metrics.counting_refusals():
            raw = await self._read(request)
            return await self._work.run(lambda: read_body(shape, raw))

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self._body_bytes_max:
                raise BodyTooLarge(f"the body exceeds {self._body_bytes_max} bytes: shorten it")
        return b"".join(parts)

    def _caller(self, request: Request) -> Caller:
        return self._desk.authenticate(request.headers.get("authorization"))

    def _model_entry(self) -> Json:
        model = self._desk.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "anabranch",
            "max_model_len": model.max_sequence_length,
        }


class _EventStream(StreamingResponse):
    """Server-sent events. Whatever ends the response ends the requests: a body iterator that was never
    begun has no `finally` that would.
    """

    def __init__(self, content: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def merged(lives: Sequence[LiveRequest]) -> _Events:
    """Events of several requests as they come, each with its request's number. Raises what ends one."""
    pending = {asyncio.ensure_future(live.next_event()): index for index, live in enumerate(lives)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                event = task.result()
                if event is not None:
                    pending[asyncio.ensure_future(lives[index].next_event())] = index
                    yield index, event
    finally:
        for task in pending:
            task.cancel()


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up first. Raises Cancelled then."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client hung up")
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _collect(answer: Answer, events: _Events) -> None:
    async for prompt, event in events:
        answer.add(prompt, event)


async def _head(events: _Events) -> list[tuple[int, inference_pb2.GenerateResponse]]:
    """Events up to the first that says something to this API's client."""
    head = []
    async for prompt, event in events:
        head.append((prompt, event))
        if event.HasField("finished") or event.delta.token_ids or event.delta.text:
            break
    return head


async def _server_sent(
    answer: Answer,
    body: _GenerationBody,
    head: Sequence[tuple[int, inference_pb2.GenerateResponse]],
    events: _Events,
) -> AsyncIterator[str]:
    def usage() -> Json | None:
        return answer.usage() if body.usage_everywhere else None

    try:
        for opening in answer.openings():
            yield _data(answer.chunk([opening], usage()))
        for prompt, event in head:
            choice = answer.add(prompt, event)
            if choice is not None:
                yield _data(answer.chunk([choice], usage()))
        async for prompt, event in events:
            choice = answer.add(prompt, event)
            if choice is not None:
                yield _data(answer.chunk([choice], usage()))
        if body.usage_wanted:
            yield _data(answer.chunk([], answer.usage()))
    except AnabranchError as error:
        yield _data(error_body(error))
    except Exception as error:  # noqa: BLE001  the status is sent: all that is left is to say it in the stream
        _log.error("stream_failed", error=error)
        yield _data(error_body(Internal(f"a bug of the gateway: {error!r}")))
    yield "data: [DONE]\n\n"


def _data(message: Json) -> str:
    return f"data: {json.dumps(message, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _close(lives: Sequence[LiveRequest]) -> None:
    for live in lives:
        live.close()
