"""Events between a request and its client: bounded, so that a slow client costs a bounded amount."""

from __future__ import annotations

import asyncio
from collections import deque

from anabranch.v1 import inference_pb2
from cluster.errors import AnabranchError, ResourceExhausted


class EventBuffer:
    """One producer that never waits, one consumer that does. Belongs to one event loop.

    open --put--> open        (the bound reached: cut, with ResourceExhausted)
    open --end--> ended       the consumer gets what is left, then the error or the end
    open --cut--> ended       the consumer gets the error at once
    """

    def __init__(self, events_max: int) -> None:
        self._events: deque[inference_pb2.GenerateResponse] = deque()
        self._events_max = events_max
        self._news = asyncio.Event()
        self._error: AnabranchError | None = None
        self.ended = False

    def put(self, event: inference_pb2.GenerateResponse) -> bool:
        """Append an event; after the end nothing happens. False if the consumer was too slow."""
        if self.ended:
            return True
        if len(self._events) >= self._events_max:
            self.cut(
                ResourceExhausted(f"the client left {self._events_max} events unread: read faster, or retry")
            )
            return False
        self._events.append(event)
        self._news.set()
        return True

    def end(self, error: AnabranchError | None = None) -> None:
        """No more events; `error` is raised after the last one. Only the first end counts."""
        if not self.ended:
            self.ended, self._error = True, error
            self._news.set()

    def cut(self, error: AnabranchError) -> None:
        """End, and drop what is unread."""
        self._events.clear()
        self.end(error)

    async def get(self) -> inference_pb2.GenerateResponse | None:
        """The next event, None at the end. Whoever ends a request by its deadline ends this wait too."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if self.ended:
                return None
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()
