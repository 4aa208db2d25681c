"""One generation, read synchronously: the I/O around `resume.Generation` and `failover.Failover`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol

import grpc

from anabranch.events import Event
from anabranch.failover import Failover, next_pause_s
from anabranch.resume import Generation
from anabranch.v1 import inference_pb2
from cluster.errors import AnabranchError, Cancelled, Unavailable


class ResponseCall(Protocol):
    """A server-streaming call in progress."""

    def __next__(self) -> inference_pb2.GenerateResponse: ...

    def cancel(self) -> Any:
        """Hang up."""


Open = Callable[[Failover, inference_pb2.GenerateRequest], ResponseCall]
"""Begins a request at the gateway whose turn it is."""


class Stream(Iterator[Event]):
    """The events of one generation; iterate over it, from one thread.

        reading --stream broke--> pausing --attempt--> reading --all choices finished--> ended
           +------------------------+-- cancel, error ---------------------------------> ended

    Leaving a `with` block cancels what is not finished; so does dropping the stream.

    >>> with client.generate("The river", max_tokens=3) as stream:
    ...     for event in stream:
    ...         print(event)  # doctest: +ELLIPSIS
    Started(request_id='...', model='...', prompt_tokens=2, seed=...)
    TokenDelta(choice=0, first_index=0, ...)
    TokenDelta(choice=0, first_index=1, ...)
    TokenDelta(choice=0, first_index=2, ...)
    Finished(choice=0, reason=<FinishReason.LENGTH: 'length'>, usage=Usage(prompt_tokens=2, ...
    """

    def __init__(self, generation: Generation, failover: Failover, open_call: Open) -> None:
        self._generation = generation
        self._failover = failover
        self._open_call = open_call
        self._ready: deque[Event] = deque()
        self._call: ResponseCall | None = None
        self._cancelled = threading.Event()
        self._lock = (
            threading.Lock()
        )  # over _call, which its reader sets: cancel() may come from another thread
        self._ended = False

    @property
    def request_id(self) -> str:
        """Identity of the request, for `abort` and `topology`."""
        return self._generation.request_id

    @property
    def resumes(self) -> int:
        """How often the stream was opened anew."""
        return max(0, self._generation.attempts - 1)

    def __next__(self) -> Event:
        """The next event. Raises an error of cluster.errors when the request failed or was cancelled."""
        try:
            while not self._ready:
                if self._ended:
                    raise StopIteration
                self._read()
        except AnabranchError:
            self.close()
            raise
        return self._ready.popleft()

    def text(self) -> str:
        """Read to the end; returns the whole text of the first choice.

        >>> client.generate("The river", max_tokens=3).text()
        ' flows to the'
        """
        for _ in self:
            pass
        return self._generation.text()

    def cancel(self) -> None:
        """Hang up, from any thread: the gateway ends the request, and reading on raises Cancelled."""
        with self._lock:
            self._cancelled.set()
            if self._call is not None:
                self._call.cancel()

    def close(self) -> None:
        """Hang up if there is something left to read, and end the iteration."""
        if not self._ended:
            self._ended = True
            self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        """One response, or one step of recovery."""
        try:
            response = next(self._current_call())
        except StopIteration:
            self._pause(self._failover.interrupted(Unavailable("the stream ended before the request did")))
            return
        except grpc.RpcError as error:
            self._refuse_when_cancelled()
            self._pause(next_pause_s(self._failover, error))
            return
        self._take(response)

    def _take(self, response: inference_pb2.GenerateResponse) -> None:
        self._failover.heard()
        events = self._generation.receive(response)
        if events:
            self._failover.answered()
            self._ready.extend(events)
        if self._generation.done:
            self._ended = True
            self._hang_up()

    def _current_call(self) -> ResponseCall:
        self._refuse_when_cancelled()
        if self._call is None:
            call = self._open_call(self._failover, self._generation.next_attempt())
            with self._lock:
                self._call = call
                if self._cancelled.is_set():  # while it was opened
                    call.cancel()
        return self._call

    def _pause(self, seconds: float) -> None:
        self._hang_up()
        self._cancelled.wait(seconds)

    def _hang_up(self) -> None:
        """Leave the present call; one that has ended takes no notice."""
        with self._lock:
            if self._call is not None:
                self._call.cancel()
                self._call = None

    def _refuse_when_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"request {self.request_id} was cancelled")
