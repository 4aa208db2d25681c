"""A virtual clock: events in the order of their moments, those of one moment in the order they were asked."""

from __future__ import annotations

import heapq
from collections.abc import Callable

_LOOKS_EVERY = 256


class Timeline:
    """Owns the time of a simulation. Nothing waits: the clock jumps from event to event."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._asked = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, moment_s: float, call: Callable[[], None]) -> None:
        """Call at a moment; at once where that has passed."""
        self._asked += 1
        heapq.heappush(self._events, (max(moment_s, self.now_s), self._asked, call))

    def run(self, goes_on: Callable[[], bool]) -> bool:
        """Until nothing is due any more; False where `goes_on`, asked now and then, ended it before."""
        done = 0
        while self._events:
            self.now_s, _, call = heapq.heappop(self._events)
            call()
            done += 1
            if done % _LOOKS_EVERY == 0 and not goes_on():
                return False
        return True
