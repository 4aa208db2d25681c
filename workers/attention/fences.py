"""Which generations of which sequences are over, as long as somebody may still speak for them."""

from __future__ import annotations

from collections import OrderedDict

from cluster.clock import Clock
from cluster.types import Generation, SequenceKey

_MOST = 65_536
_LEASES = 2
_NEVER = Generation(-1)


class Fences:
    """Remembers the highest ended generation of each sequence for `_LEASES` leases, `_MOST` of them at most.

    Who held a sequence asks every quarter of a lease whether it still does, and no call lives that long:
    after two leases nobody speaks for an ended life any more, and a new request may use the sequence's key.
    (But for a process that was frozen for longer: what it frees then is computed again. No read can be
    wrong, since the id of a shard is never used twice.)
    """

    def __init__(self, lease_ms: int, clock: Clock) -> None:
        self._kept_s = _LEASES * lease_ms / 1000
        self._clock = clock
        self._ended: OrderedDict[SequenceKey, tuple[Generation, float]] = OrderedDict()
        """With the time at which it is forgotten, the first one first."""

    def raise_to(self, key: SequenceKey, generation: Generation) -> None:
        """This generation and all below are over."""
        self._ended[key] = max(generation, self.highest(key)), self._clock() + self._kept_s
        self._ended.move_to_end(key)
        while len(self._ended) > _MOST or self._is_over(next(iter(self._ended))):
            self._ended.popitem(last=False)

    def highest(self, key: SequenceKey) -> Generation:
        """The highest generation that is over; below all where none is remembered."""
        return _NEVER if key not in self._ended or self._is_over(key) else self._ended[key][0]

    def _is_over(self, key: SequenceKey) -> bool:
        return self._ended[key][1] <= self._clock()
