"""Servers whose pace is known: the first token after `first_s`, each further one `gap_s` later, none early.

One speaks our API, one OpenAI's, both from the same script, on loopback, a thread for each stream.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from anabranch.v1 import inference_pb2 as api
from anabranch.v1 import inference_pb2_grpc, types_pb2
from cluster import errors, rpc
from cluster.config import SecurityConfig
from loadgen.drivers.interface import Target

MODEL = "paced"
CONTEXT = 4096
VOCABULARY = 1024
PROMPT_TOKENS_CACHED = 3


@dataclass
class Script:
    """How a server behaves. `refuses` tells, by the number of the request, whether it is refused; those from
    number `holds_from` on get one token, and then nothing before the server's end; `held` counts them once
    that token is sent.
    """

    first_s: float = 0.1
    gap_s: float = 0.02
    refuses: Callable[[int], bool] = lambda _: False
    holds_from: int | None = None
    held: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    places: int | None = None
    """Requests that are served at once; others wait for their first token. None: all."""
    dilation: float | None = None
    """What the server that speaks our API says of its time."""
    prompts: list[Any] = field(default_factory=list)
    """What was asked, in the order of arrival."""


class Paced:
    """The pace, for both servers."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._places: AbstractContextManager[object] = (
            threading.Semaphore(self.script.places) if self.script.places else nullcontext()
        )

    def admit(self, prompt: Any) -> int:
        """Note a request; its number. Raises ResourceExhausted where it is to be refused."""
        with self._lock:
            number = len(self.script.prompts)
            self.script.prompts.append(prompt)
        if self.script.refuses(number):
            raise errors.ResourceExhausted("refused as asked for")
        return number

    def tokens(self, number: int, count: int) -> Iterator[int]:
        """Tokens 0, 1, ... at their moments."""
        with self._places:
            began_s = monotonic()
            for token in range(count):
                if token and self.script.holds_from is not None and number >= self.script.holds_from:
                    self.script.held.release()
                    self._over.wait()
                if self._over.wait(began_s + self.script.first_s + token * self.script.gap_s - monotonic()):
                    raise errors.Unavailable("the server ends")
                yield token

    def end(self) -> None:
        """Let no stream wait any longer."""
        self._over.set()


class PacedServer(Protocol):
    """A running server."""

    script: Script
    target: Target

    def kill(self) -> None:
        """Break all streams; from now on nobody listens."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class GrpcServer(inference_pb2_grpc.InferenceServiceServicer):
    """Speaks our API."""

    def __init__(self, script: Script | None = None) -> None:
        self._paced = Paced(script)
        self.script = self._paced.script
        self._server = rpc.server(threads=64)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        port = rpc.bind(self._server, "127.0.0.1", 0, SecurityConfig())
        self.target = Target((f"127.0.0.1:{port}",), timeout_s=20.0, outage_s=0.3)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """See `PacedServer`."""
        stopped = self._server.stop(None)
        self._paced.end()
        stopped.wait(10.0)

    @rpc.unary
    def ListModels(
        self, request: api.ListModelsRequest, context: grpc.ServicerContext
    ) -> api.ListModelsResponse:
        """The one model."""
        model = api.Model(
            name=MODEL,
            max_sequence_length=CONTEXT,
            vocabulary_size=VOCABULARY,
            dilation=self.script.dilation,
        )
        return api.ListModelsResponse(models=[model])

    @rpc.stream
    def Generate(
        self, request: api.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[api.GenerateResponse]:
        """The script."""
        number = self._paced.admit(list(request.tokens.token_ids) or request.text)
        prompt_tokens = len(request.tokens.token_ids) or len(request.text.split())
        count = request.sampling.max_tokens
        yield _response(request, started=api.Started(model=MODEL, prompt_tokens=prompt_tokens, seed=1))
        for token in self._paced.tokens(number, count):
            delta = api.TokensDelta(first_index=token, token_ids=[token], text=f" t{token}")
            yield _response(request, delta=delta)
        finished = api.Finished(
            reason=types_pb2.FINISH_REASON_LENGTH,
            usage=api.Usage(
                prompt_tokens=prompt_tokens, completion_tokens=count, cached_tokens=PROMPT_TOKENS_CACHED
            ),
            timings=types_pb2.Timings(dense_seconds=0.25, attention_seconds=0.5),
        )
        yield _response(request, finished=finished)


class OpenAiServer:
    """Speaks OpenAI's."""

    def __init__(self, script: Script | None = None) -> None:
        self._paced = paced = Paced(script)
        self.script = self._paced.script

        class Handler(_Handler):
            pace = paced

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # a stream that did not end would be found
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.target = Target(url=f"http://127.0.0.1:{self._server.server_port}", timeout_s=20.0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """See `PacedServer`."""
        self._paced.end()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    pace: Paced

    def do_GET(self) -> None:
        """GET /v1/models."""
        body = json.dumps({"data": [{"id": MODEL, "max_model_len": CONTEXT}]}).encode()
        self._head(200, str(len(body)))
        self.wfile.write(body)

    def do_POST(self) -> None:
        """POST /v1/completions."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        try:
            number = self.pace.admit(asked["prompt"])
        except errors.ResourceExhausted as error:
            body = json.dumps({"error": {"message": error.message}}).encode()
            self._head(429, str(len(body)))
            self.wfile.write(body)
            return
        self._head(200)
        count = asked["max_tokens"]
        try:
            for token in self.pace.tokens(number, count):
                reason = "length" if token == count - 1 else None
                self._event({"choices": [{"index": 0, "text": f" t{token}", "finish_reason": reason}]})
        except errors.Unavailable:
            return  # the connection closes in the middle of the stream
        words = len(asked["prompt"].split()) if isinstance(asked["prompt"], str) else len(asked["prompt"])
        details = {"cached_tokens": PROMPT_TOKENS_CACHED}
        usage = {"prompt_tokens": words, "completion_tokens": count, "prompt_tokens_details": details}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _head(self, status: int, length: str = "") -> None:
        self.send_response(status)
        if length:
            self.send_header("content-length", length)
        self.end_headers()

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it
        """Nothing."""


def _response(request: api.GenerateRequest, **event: Any) -> api.GenerateResponse:
    return api.GenerateResponse(request_id=request.request_id, **event)
