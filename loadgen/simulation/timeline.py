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

    @property
    def has_more(self) -> bool:
        """Whether something is still to come."""
        return bool(self._events)

    def run(self, is_over: Callable[[], bool], goes_on: Callable[[], bool]) -> bool:
        """Until it is over, which is asked before each event; False where `goes_on`, asked now and then,
        ended it before. What was still to come is forgotten.
        """
        done, is_wanted = 0, True
        while self._events and is_wanted and not is_over():
            self.now_s, _, call = heapq.heappop(self._events)
            call()
            done += 1
            is_wanted = done % _LOOKS_EVERY != 0 or goes_on()
        self._events.clear()
        return is_wanted
