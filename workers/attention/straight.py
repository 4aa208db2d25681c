"""Messages answered straight off a lane's socket, while nothing happens that one of them has to look at."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.fault_points import reach
from workers.attention.prepared_step import PreparedStep
from workers.attention.turns import Turns
from workers.kernels.signature import Exchange, Span
from workers.lanes.link import ByteLink


class StraightAnswers:
    """The layers of a step that follow its plan, from socket to socket in a few calls of the compiled kernel.

    A walk over the cache displaces what Python needs from the processor's own, so each of its calls between
    two walks is slow: what a session does for a message takes 0.2 ms then. Everything that is not the next
    layer of a step that stands, whole and in order, is left to the session (`serve` returns it), which is why
    nothing here can answer with a fault.
    """

    def __init__(
        self, exchange: Exchange, turns: Turns, link: ByteLink, on_busy: Callable[[float], None]
    ) -> None:
        self._exchange = exchange
        self._turns = turns
        self._link = link
        self._on_busy = on_busy
        self._steps: dict[int, PreparedStep] = {}

    def begin(self, micro_batch: int, number: int, step: PreparedStep, spans: tuple[Span, ...]) -> None:
        """Messages of this step may be answered here: all its rows see what `spans` say, in one turn."""
        self._steps[micro_batch] = step
        self._exchange.begin(micro_batch, number, spans, step.rows, step.slots)

    def end(self, micro_batch: int) -> None:
        """The step is over."""
        if self._steps.pop(micro_batch, None) is not None:
            self._exchange.end(micro_batch)

    def serve(self, wait_s: float, stall_s: float) -> bytes:
        """Answer until something else arrives, of which this returns the bytes that came so far; none where
        nothing came for `wait_s`, or ever will. What the socket does not take at once of a reply must leave
        within `stall_s`. Raises LaneBroken.
        """
        exchange = self._exchange
        try:
            while (micro_batch := exchange.receive(wait_s)) >= 0:
                with self._turns:
                    if not self._compute(self._steps[micro_batch]):
                        break
                if not exchange.has_query:
                    exchange.finish()
                elif left := exchange.reply():
                    self._link.write([memoryview(left)], time.monotonic() + stall_s, None)
            return exchange.take()
        finally:
            self._on_busy(exchange.take_busy())
            self._link.bytes_received += exchange.take_received()
            self._link.bytes_sent += exchange.take_sent()

    def _compute(self, step: PreparedStep) -> bool:
        """Append and attend; False, and nothing done, where the session has to look."""
        exchange = self._exchange
        appended = exchange.layer - 1 if exchange.has_rows else None
        if not step.stands(appended):
            return False
        if appended is not None:
            exchange.append()
            step.mark(appended)
        reach("append-apply")
        if exchange.has_query:
            exchange.attend()
        return True
