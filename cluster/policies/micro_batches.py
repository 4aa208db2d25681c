"""Which micro-batch each sequence of a step belongs to, and whether there are two at all. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from cluster.perfmodel import Line, MicroBatch, SideTimes, staggering_gain
from cluster.types import SequenceKey


class NewTokens(Protocol):
    """One sequence's part of a step: `count` tokens from position `start` on."""

    @property
    def key(self) -> SequenceKey:
        """The sequence."""
        ...

    @property
    def start(self) -> int:
        """Its tokens before the step."""
        ...

    @property
    def count(self) -> int:
        """Tokens that the step computes."""
        ...


_Chunk = TypeVar("_Chunk", bound=NewTokens)

MICRO_BATCHES = 2
"""Most of a step: with two, nothing has to migrate between replicas (Lamina's rotation, n = 2)."""

_GAIN_LEAST = 1.03
"""Two micro-batches must promise this much: what they were timed by is noisy."""

_LOOK_STEPS_MOST = 32
"""How often the choice is looked at again while the batch stays the same, in sequences and in rows. At first
sooner, twice as many steps later each time: what such a batch takes is only guessed until it was run.
"""

_IMBALANCE_MOST = 0.25
"""Share of the work by which one side may exceed the other before a sequence changes over."""

_ROW_TOKENS = 64
"""Tokens of context that weigh as much as a row does beside its attention."""

_NEWEST_SHARE = 0.1
_SIZES_PER_DOUBLING = 4
_TRUSTED = 4
"""Times of a size that tell of it more than a line through all sizes does."""


@dataclass(slots=True)
class _Seen:
    """What micro-batches of one size took: moving averages, plain ones at first."""

    units: float = 0.0
    seconds: float = 0.0
    times: int = 0

    def note(self, units: int, seconds: float) -> None:
        self.times += 1
        share = max(_NEWEST_SHARE, 1 / self.times)
        self.units += share * (units - self.units)
        self.seconds += share * (seconds - self.seconds)


class TimesSeen:
    """Seconds of micro-batches by their size, and the line through them.

    Sizes a quarter of a doubling apart are remembered apart: a batch that decodes for long does not wash out
    what smaller ones took, and a product of few rows may take longer than one of more.
    """

    def __init__(self, *, is_fixed: bool) -> None:
        """`is_fixed`: what is believed of other sizes while only one was seen (`Line.through`)."""
        self._is_fixed = is_fixed
        self._sizes: dict[int, _Seen] = {}
        self._line: Line | None = None

    def note(self, units: int, seconds: float) -> None:
        """A micro-batch of `units` took `seconds`."""
        self._sizes.setdefault(_size(units), _Seen()).note(units, seconds)
        self._line = None

    def line(self) -> Line | None:
        """None before anything was noted. May be called from another thread."""
        line = self._line
        if line is None and self._sizes:
            points = [(seen.units, seen.seconds) for seen in list(self._sizes.values())]
            line = self._line = Line.through(points, is_fixed=self._is_fixed)
        return line

    def at(self, units: float) -> float:
        """Seconds for `units`: from the nearest size that was seen often enough, as the line rises; by the
        line where there is none. Something was noted.
        """
        line, size = self.line(), _size(units)
        assert line is not None, "see `line`"
        trusted = [known for known, seen in self._sizes.items() if seen.times >= _TRUSTED]
        if not trusted:
            return line.at(units)
        nearest = self._sizes[min(trusted, key=lambda known: abs(known - size))]
        return max(0.0, nearest.seconds + line.each_s * (units - nearest.units))


class MicroBatches:
    """Owner of who belongs where. A sequence stays where it is, so that its plan rows stay differences,
    unless one side has grown much heavier than the other; then one sequence a step changes over.
    """

    def __init__(self, setting: Literal["auto", 1, 2]) -> None:
        self._setting = setting
        self._place: dict[SequenceKey, int] = {}
        self._dense, self._lane = TimesSeen(is_fixed=True), TimesSeen(is_fixed=True)
        self._attention = TimesSeen(is_fixed=False)
        self._is_split = False
        self._chosen_for: tuple[int, int] = (0, 0)
        """Chunks and rows of the batch for which the choice was made."""
        self._looks_after = 0
        """Steps from the last look at it to the next."""
        self._steps_left = 0
        """Until that one."""

    def split(self, chunks: Sequence[_Chunk], *, remote: bool) -> list[list[_Chunk]]:
        """The chunks by micro-batch, in the plan's order; none is empty.

        `remote`: whether attention runs elsewhere, so that there is something to hide.
        """
        assert chunks, "a step has a chunk"
        if not remote or self._setting == 1:
            return [list(chunks)]
        self._assign(chunks)
        halves: list[list[_Chunk]] = [[], []]
        for chunk in chunks:
            halves[self._place[chunk.key]].append(chunk)
        return halves if all(halves) and self._pays(halves) else [list(chunks)]

    def note(self, work: MicroBatch, dense_s: float, attention_s: float, lane_s: float) -> None:
        """What a micro-batch with remote attention took on both sides and between them."""
        self._dense.note(work.rows, dense_s)
        self._attention.note(work.scores, attention_s)
        self._lane.note(work.rows, lane_s)

    def lines(self) -> tuple[Line, Line] | None:
        """Seconds of dense work by rows and of attention by scores; None before a step attended elsewhere.
        May be called from another thread.
        """
        dense, attention = self._dense.line(), self._attention.line()
        return (dense, attention) if dense is not None and attention is not None else None

    def _pays(self, halves: Sequence[Sequence[NewTokens]]) -> bool:
        if self._setting == 2:
            return True
        # By rows too: what pays beside a prompt does not in the decoding steps behind it, of as many chunks.
        batch = sum(map(len, halves)), sum(chunk.count for half in halves for chunk in half)
        if batch == self._chosen_for and self._steps_left > 0:
            self._steps_left -= 1
            return self._is_split
        if self.lines() is not None:
            self._looks_after = (
                min(2 * self._looks_after, _LOOK_STEPS_MOST) if batch == self._chosen_for else 1
            )
            self._chosen_for, self._steps_left = batch, self._looks_after - 1
            first, second = (work_of(half) for half in halves)
            times = SideTimes(self._dense.at, self._attention.at, self._lane.at(first.rows))
            self._is_split = staggering_gain(times, first, second) >= _GAIN_LEAST
        return self._is_split

    def _assign(self, chunks: Sequence[NewTokens]) -> None:
        """Keep who was there, forget who left, put newcomers on the lighter side, level large differences."""
        known, self._place = self._place, {}
        weights = [0, 0]
        newcomers = []
        for chunk in chunks:
            side = known.get(chunk.key)
            if side is None:
                newcomers.append(chunk)
            else:
                self._place[chunk.key] = side
                weights[side] += _weight(chunk)
        for chunk in sorted(newcomers, key=_weight, reverse=True):
            side = 0 if weights[0] <= weights[1] else 1
            self._place[chunk.key] = side
            weights[side] += _weight(chunk)
        self._level(chunks, weights)

    def _level(self, chunks: Sequence[NewTokens], weights: Sequence[int]) -> None:
        """Move the chunk that levels best from the much heavier side, if one does."""
        difference = abs(weights[0] - weights[1])
        if difference <= _IMBALANCE_MOST * sum(weights):
            return
        heavy = 0 if weights[0] > weights[1] else 1
        movable = [
            chunk for chunk in chunks if self._place[chunk.key] == heavy and _weight(chunk) < difference
        ]
        if movable:
            best = min(movable, key=lambda chunk: abs(difference - 2 * _weight(chunk)))
            self._place[best.key] = 1 - heavy


def work_of(chunks: Sequence[NewTokens]) -> MicroBatch:
    """What chunks ask of both sides, windows left out."""
    return MicroBatch(
        sum(chunk.count for chunk in chunks), sum(chunk.count * chunk.start for chunk in chunks)
    )


def _size(units: float) -> int:
    return round(_SIZES_PER_DOUBLING * math.log2(units + 1))


def _weight(chunk: NewTokens) -> int:
    return chunk.count * (chunk.start + _ROW_TOKENS)
