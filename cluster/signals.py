"""SIGTERM and Ctrl-C as calls on a thread of their own: the first asks, the second insists."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_CAUGHT = (signal.SIGTERM, signal.SIGINT)
_END = 0
"""No signal has this number."""


class Interrupts:
    """Once started, the first SIGTERM or Ctrl-C calls `ask`, every later one `insist` with its number.

    Python runs a handler between two bytecodes of the main thread. That may hold the very lock that the call
    needs; and where the kernel gave the signal to another thread, which it may, a main thread that waits for
    a lock sleeps on and the handler never runs. The byte that Python writes for each signal comes all the
    same: a thread waits for it. To be started on the main thread.
    """

    def __init__(self, ask: Callable[[], None], insist: Callable[[int], None]) -> None:
        self._ask = ask
        self._insist = insist
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_descriptor = -1
        self._relay = threading.Thread(target=self._run, name="signals", daemon=True)

    def start(self) -> None:
        """Catch signals from now on, until `close` or the process's end."""
        self._previous_descriptor = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _leave_to_the_relay) for number in _CAUGHT}
        self._relay.start()

    def close(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        with contextlib.suppress(BlockingIOError):  # full of signals, which wake the thread as well
            self._writing.send(bytes([_END]))
        self._writing.close()
        self._relay.join()
        self._reading.close()

    def __enter__(self) -> Interrupts:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        asked = False
        while number := self._next():
            if number not in _CAUGHT:
                continue
            if asked:
                self._insist(number)
            else:
                self._ask()
            asked = True

    def _next(self) -> int:
        """A signal's number; `_END` where no more will come."""
        return next(iter(self._reading.recv(1)), _END)


def _leave_to_the_relay(_number: int, _frame: FrameType | None) -> None:
    """A handler must be there for the byte to be written."""
