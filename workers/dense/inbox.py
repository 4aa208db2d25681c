"""What other threads want of the engine, done by the engine's own thread between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from cluster.clock import Clock, monotonic
from cluster.errors import Unavailable

Call = Callable[[], None]


class Inbox:
    """Calls waiting for the engine's thread, in order of arrival.

    `offer` is for the world and bounded; `post` is for answers to what the engine itself asked (rooms,
    adoptions, peers) and bounded by it: at most a few per live sequence and per peer.
    """

    def __init__(self, offers_most: int, clock: Clock = monotonic) -> None:
        self._offers_most = offers_most
        self._clock = clock
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()

    def offer(self, call: Call, timeout_s: float) -> None:
        """Hand over a call, waiting while the inbox is full. Raises Unavailable after `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._calls) < self._offers_most, timeout_s):
                raise Unavailable("the dense worker's engine does not keep up: retry later or elsewhere")
            self._calls.append(call)
            self._changed.notify_all()

    def post(self, call: Call) -> None:
        """Hand over an answer; never waits."""
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Until there is a call, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._calls), timeout_s)

    def run(self, most: int, budget_s: float) -> int:
        """Do up to `most` calls within about `budget_s` seconds, so that steps go on; returns how many."""
        began_s = self._clock()
        done = 0
        while done < most and self._clock() - began_s < budget_s:
            with self._changed:
                if not self._calls:
                    break
                call = self._calls.popleft()
                self._changed.notify_all()
            call()
            done += 1
        return done
