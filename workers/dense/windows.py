"""Sliding windows give memory back: what no row will see any more leaves the pool. On the engine's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from workers.dense.sequences import LiveSequence
from workers.dense.step_layout import Chunk
from workers.dense.submissions import Door

_BLOCKS_AT_ONCE = 4
"""Given back together, so that a sequence asks its workers once in so many blocks of tokens."""

_TOKENS_BEHIND = 32
"""Kept beyond the window: who takes the sequence over having heard of so many tokens fewer still computes
nothing again.
"""


class WindowTrimmer:
    """Trims sequences of a model of which every layer has a window; of others nothing ever expires."""

    def __init__(
        self, door: Door, window_tokens: int | None, is_moving: Callable[[LiveSequence], bool]
    ) -> None:
        """`window_tokens`: the widest layer's; None where a layer sees everything. What moves is let be."""
        self._door = door
        self._is_moving = is_moving
        self._window_tokens = window_tokens
        self._least_tokens = _BLOCKS_AT_ONCE * door.geometry.block_tokens

    def trim(self, chunks: Iterable[Chunk]) -> None:
        """After a step was applied. It computed a row at each chunk's start, so what lies before that is
        certain at its worker.
        """
        if self._window_tokens is None:
            return
        for chunk in chunks:
            sequence = chunk.sequence
            position = chunk.start - self._window_tokens + 1 - _TOKENS_BEHIND
            if position - sequence.first_kept >= self._least_tokens and self._may_trim(sequence, position):
                self._door.let_expire(sequence, position)
                self._door.scheduler.expire_before(sequence.key, sequence.first_kept)

    def _may_trim(self, sequence: LiveSequence, position: int) -> bool:
        """It lives, no shard of it is on its way, and no row to come sees further back: nothing was lost."""
        if not self._door.table.is_live(sequence) or self._is_moving(sequence):
            return False
        return position <= self._door.scheduler.needed_from(sequence.key)
