"""Time as an argument, so that policies can run on a virtual clock."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds."""

    def __call__(self) -> float:
        """Seconds since an arbitrary origin; never goes backwards."""
        ...


monotonic: Clock = time.monotonic


class ManualClock:
    """A clock that moves only when told; for tests and simulation."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """The current virtual time in seconds."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`, which must not be negative."""
        assert seconds >= 0
        self.now_s += seconds


def remaining_ms(deadline_s: float, now_s: float) -> int:
    """Milliseconds left until a deadline, never negative: how deadlines travel on the wire."""
    return max(0, int((deadline_s - now_s) * 1000))
