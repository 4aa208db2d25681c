"""Signals as calls on a thread of their own: the first asks, the second insists."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """While entered, the first SIGTERM or Ctrl-C calls `ask`, every later one `insist`.

    The calls are made on a thread of their own: a handler runs between two bytecodes of the main
    thread, which may hold the very lock that the call needs. To be entered on the main thread.
    """

    def __init__(self, ask: Callable[[], None], insist: Callable[[], None]) -> None:
        self._ask = ask
        self._insist = insist
        self._received: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._previous: dict[signal.Signals, Any] = {}
        self._relay = threading.Thread(target=self._run, name="signals", daemon=True)

    def __enter__(self) -> Interrupts:
        self._previous = {number: signal.signal(number, self._handle) for number in _CAUGHT}
        self._relay.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._received.put(False)
        self._relay.join()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._received.put(True)  # allowed in handlers, unlike most locks

    def _run(self) -> None:
        call = self._ask
        while self._received.get():
            call()
            call = self._insist
