"""One-time secrets that join a connection to the lane it was opened for."""

from __future__ import annotations

import secrets
import threading

from cluster.clock import Clock
from cluster.errors import LaneBroken, ResourceExhausted
from workers.lanes.frames import TICKET_BYTES
from workers.lanes.serve import LaneEnd

_VALID_S = 10.0


class TicketBook:
    """Lanes that were opened over gRPC and whose connection has not come yet; at most `most`."""

    def __init__(self, most: int, clock: Clock) -> None:
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[bytes, tuple[float, LaneEnd]] = {}

    def issue(self, lane: LaneEnd) -> bytes:
        """A ticket for `lane`, good once and for a short time. Raises ResourceExhausted."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            now_s = self._clock()
            self._waiting = {key: held for key, held in self._waiting.items() if held[0] > now_s}
            if len(self._waiting) >= self._most:
                raise ResourceExhausted(f"{self._most} lanes wait for their connection")
            self._waiting[ticket] = (now_s + _VALID_S, lane)
        return ticket

    def redeem(self, ticket: bytes) -> LaneEnd:
        """The lane a ticket was issued for. Raises LaneBroken when it is unknown, used or too old."""
        with self._lock:
            end_s, lane = self._waiting.pop(ticket, (0.0, None))
            if lane is None or end_s <= self._clock():
                raise LaneBroken("the ticket is unknown, used or too old: open the lane again")
            return lane
