"""What a transport must do to carry lanes: move bytes in order, by a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class ByteLink(Protocol):
    """A connected, ordered byte stream, used by one thread; `shut_down` and `close` may come from another.

    Reading and writing raise LaneBroken when the other side is gone.
    """

    bytes_sent: int
    bytes_received: int

    def write(
        self, buffers: Sequence[memoryview], deadline_s: float, on_readable: Callable[[], None] | None
    ) -> None:
        """Send all buffers by the monotonic time `deadline_s`, or raise LaneBroken.

        While the other side takes nothing, `on_readable` is called whenever bytes wait to be read: two
        sides that only write would wait for each other for ever. One of them may give None: it never reads
        before it has written, and lets the other side do so.
        """
        ...

    def read_into(self, target: memoryview, deadline_s: float) -> int:
        """Receive at least one byte into `target`; returns how many, 0 once `deadline_s` has passed."""
        ...

    def shut_down(self) -> None:
        """Wake whoever waits in this link, with LaneBroken; its thread then closes it."""
        ...

    def close(self) -> None:
        """End the stream; a thread waiting in it wakes with LaneBroken. Idempotent."""
        ...
