"""A lock that serves in the order of asking, so that a long computation cannot starve the others."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A fair, non-reentrant lock for `with`: whoever asks first is served first.

    A plain lock may go back at once to the thread that just released it; a lane serving a long chunk in
    slices would then keep every other lane waiting.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._owner: int | None = None
        self._waiting: deque[threading.Lock] = deque()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._owner == threading.get_ident()

    @property
    def waiting(self) -> int:
        """How many threads wait for a turn."""
        return len(self._waiting)

    def __enter__(self) -> None:
        assert not self.is_mine, "a thread waits for the turn it has"
        with self._guard:
            if not self._taken:
                self._taken = True
                self._owner = threading.get_ident()
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # released by whoever hands the turn over
        self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            self._owner = None
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
