"""Replies that came before they were asked for, one per micro-batch."""

from __future__ import annotations

from cluster.errors import AnabranchError
from workers.lanes.messages import PartialReply

Place = tuple[int, int, int]
"""(step, micro-batch, layer)."""

Outcome = PartialReply | AnabranchError


class ReplySlots:
    """Holds at most one outcome per micro-batch: a newer one replaces what nobody took.

    A step that was given up leaves its reply unasked for; it must neither pile up nor be mistaken.
    """

    def __init__(self) -> None:
        self._slots: dict[int, tuple[Place, Outcome]] = {}

    def put(self, place: Place, outcome: Outcome) -> None:
        """Keep the outcome of a query."""
        self._slots[place[1]] = (place, outcome)

    def take(self, place: Place) -> Outcome | None:
        """The outcome of exactly this query, once; None while it is not there."""
        held = self._slots.get(place[1])
        if held is None or held[0] != place:
            return None
        del self._slots[place[1]]
        return held[1]
