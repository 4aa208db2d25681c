"""One generation, read with asyncio: the I/O around `resume.Generation` and `failover.Failover`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TypeAlias

import grpc

from anabranch.events import Event
from anabranch.failover import Failover, next_pause_s
from anabranch.resume import Generation
from anabranch.v1 import inference_pb2
from cluster.errors import AnabranchError, Cancelled, Unavailable

ResponseCall: TypeAlias = (  # a text, since gRPC's classes take type arguments in their stubs only
    "grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]"
)

Open: TypeAlias = "Callable[[Failover, inference_pb2.GenerateRequest], Awaitable[ResponseCall]]"
"""Begins a request at the gateway whose turn it is."""


class AsyncStream(AsyncIterator[Event]):
    """The events of one generation; `stream.Stream` for asyncio, read by one task of one loop.

    >>> async def read():
    ...     async with client.generate("The river", max_tokens=3) as stream:
    ...         return [event.text async for event in stream]
    >>> run(read())
    ['', ' flows', ' to', ' the', '']
    """

    def __init__(self, generation: Generation, failover: Failover, open_call: Open) -> None:
        self._generation = generation
        self._failover = failover
        self._open_call = open_call
        self._ready: deque[Event] = deque()
        self._call: ResponseCall | None = None
        self._cancelled = asyncio.Event()
        self._ended = False

    @property
    def request_id(self) -> str:
        """Identity of the request, for `abort` and `topology`."""
        return self._generation.request_id

    @property
    def resumes(self) -> int:
        """How often the stream was opened anew."""
        return max(0, self._generation.attempts - 1)

    async def __anext__(self) -> Event:
        """The next event. Raises an error of cluster.errors when the request failed or was cancelled."""
        try:
            while not self._ready:
                if self._ended:
                    raise StopAsyncIteration
                await self._read()
        except (AnabranchError, asyncio.CancelledError):
            self.close()
            raise
        return self._ready.popleft()

    async def text(self) -> str:
        """Read to the end; returns the whole text of the first choice.

        >>> run(client.generate("The river", max_tokens=3).text())
        ' flows to the'
        """
        async for _ in self:
            pass
        return self._generation.text()

    def cancel(self) -> None:
        """Hang up: the gateway ends the request, and reading on raises Cancelled."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Hang up if there is something left to read, and end the iteration."""
        if not self._ended:
            self._ended = True
            self.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def _read(self) -> None:
        """One response, or one step of recovery."""
        try:
            response = await (await self._current_call()).read()
        except grpc.RpcError as error:
            self._refuse_when_cancelled()
            await self._pause(next_pause_s(self._failover, error))
            return
        except asyncio.CancelledError:
            # gRPC reports a call hung up by `cancel` as if the task were cancelled; a task that is, goes on.
            if _task_is_cancelled():
                raise
            self._refuse_when_cancelled()
            await self._pause(self._failover.interrupted(Unavailable("the connection was closed")))
            return
        if isinstance(response, inference_pb2.GenerateResponse):
            self._take(response)
        else:  # grpc.aio.EOF
            early = Unavailable("the stream ended before the request did")
            await self._pause(self._failover.interrupted(early))

    def _take(self, response: inference_pb2.GenerateResponse) -> None:
        self._failover.heard()
        events = self._generation.receive(response)
        if events:
            self._failover.answered()
            self._ready.extend(events)
        if self._generation.done:
            self._ended = True
            self._hang_up()

    async def _current_call(self) -> ResponseCall:
        self._refuse_when_cancelled()
        if self._call is None:
            self._call = await self._open_call(self._failover, self._generation.next_attempt())
            if self._cancelled.is_set():  # while it was opened
                self._call.cancel()
        return self._call

    async def _pause(self, seconds: float) -> None:
        self._hang_up()
        await wait(self._cancelled, seconds)

    def _hang_up(self) -> None:
        """Leave the present call; one that has ended takes no notice."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _refuse_when_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"request {self.request_id} was cancelled")


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Return when the event is set or the time is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
