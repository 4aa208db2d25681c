"""What a machine takes for the parts of a step, as `anabranch loadgen check` measured them. Pure.

Parts only, each by itself: nothing here comes from a run that is to be predicted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, Literal, TypeAlias

import numpy as np

Lanes: TypeAlias = Literal["local", "remote", "asleep"]
"""Where attention runs: in the dense process; in another, whose lanes ask for bytes before they sleep; in
another, whose lanes do not.
"""

Points: TypeAlias = Sequence[tuple[int, float]]
"""(size, seconds), ascending."""

Shapes: TypeAlias = Sequence[tuple[int, int, int, float, float, float]]
"""(sequences, rows and cached tokens of each; seconds of attending, of handing over, of the lane else)."""

_TELLING = 2
"""Points that tell what lies between and beyond them."""
_MEETING = (16, 32, 64)
"""Rows at which decoding and chunks were both measured: they tell what a sequence costs beyond its row."""


@dataclass(frozen=True)
class AttendCost:
    """Seconds over all layers that an attention worker takes, and the way to it and back."""

    shapes: Shapes

    def rows_s(self, sequences: int, read_tokens: int) -> float:
        """Attending for decoding rows, which read so many cached tokens together."""
        base_s, each_s, token_s = self._rows
        return max(0.0, base_s + each_s * sequences + token_s * read_tokens)

    def chunk_s(self, rows: int, cached: int) -> float:
        """Attending for a chunk of so many rows, each of which sees all cached tokens."""
        row_s, token_s, score_s = self._chunks
        return max(0.0, row_s * rows + token_s * cached + score_s * rows * cached)

    def sent_s(self, rows: int) -> float:
        """The dense worker hands over messages of so many rows."""
        base_s, each_s = self._sent
        return max(0.0, base_s + each_s * rows)

    def lane_s(self, rows: int) -> float:
        """What else lies between asking and the answer."""
        base_s, each_s = self._lane
        return max(0.0, base_s + each_s * rows)

    @cached_property
    def _rows(self) -> Sequence[float]:
        found = [(n, n * cached, s) for n, rows, cached, s, *_ in self.shapes if rows == 1]
        return _fit([(1.0, n, tokens) for n, tokens, _ in found], [s for *_, s in found])

    @cached_property
    def _chunks(self) -> Sequence[float]:
        found = [(rows, cached, s) for _, rows, cached, s, *_ in self.shapes if rows > 1]
        return _fit([(rows, cached, rows * cached) for rows, cached, _ in found], [s for *_, s in found])

    @cached_property
    def _sent(self) -> Sequence[float]:
        return self._by_rows(lambda shape: shape[4])

    @cached_property
    def _lane(self) -> Sequence[float]:
        return self._by_rows(lambda shape: shape[5])

    def _by_rows(self, seconds: Callable[[Sequence[Any]], float]) -> Sequence[float]:
        rows = [(1.0, sequences * each) for sequences, each, *_ in self.shapes]
        values = [seconds(shape) for shape in self.shapes]
        return _fit(rows, values) if any(values) else (0.0, 0.0)


@dataclass(frozen=True)
class Calibration:
    """One machine with one model; a role has one core. Seconds over all layers of a step.

    `decode`: steps of so many decoding rows without any attention; `first`: the layers of a prompt's first
    chunk of so many tokens, attention over itself included; `later`: of one that merges what it sees of
    others; `own`: attention of a chunk over itself; `head`: head and sampler. `turns`: of their core, what
    asking an attention worker whose lanes sleep about so many rows takes a dense worker that shares it:
    handing over, taking back, and finding its caches cold, since another computed meanwhile; none where no
    core is to be shared. `served`: what a dense worker's process computes beside its steps to tell of so many
    tokens; `passed_on`: what gateway and client compute for them; none of both where nobody is told.
    """

    decode: Points
    first: Points
    later: Points
    own: Points
    head: Points
    turns: Points
    served: Points
    passed_on: Points
    attend: Mapping[Lanes, AttendCost]

    def body_s(self, tokens: int) -> float:
        """The layers over so many rows, without attention."""
        return _at(self._body, tokens)

    def merge_s(self, tokens: int) -> float:
        """What a step of chunks merges of what lies elsewhere."""
        first = dict(self.first)
        return _at([(0, 0.0), *((n, max(0.0, s - first[n])) for n, s in self.later)], tokens)

    def own_s(self, tokens: int) -> float:
        """Attention of a chunk over itself."""
        return _at([(0, 0.0), *self.own], tokens) if tokens > 1 else 0.0

    def head_s(self, rows: int) -> float:
        """Head and sampler."""
        return _at(self.head, rows) if rows else 0.0

    def turns_s(self, rows: int) -> float:
        """Of a shared core, for asking about so many rows."""
        return _at(self.turns, rows)

    def served_s(self, tokens: int) -> float:
        """Of the dense worker's core, for telling of a step's tokens."""
        return _at([(0, 0.0), *self.served], tokens)

    def passed_on_s(self, tokens: int) -> float:
        """Of other cores, for bringing a step's tokens to who asked."""
        return _at([(0, 0.0), *self.passed_on], tokens)

    @cached_property
    def sequence_s(self) -> float:
        """What a sequence costs a step beyond its row: planning, applying, telling."""
        decode, chunk = dict(self.decode), dict(self.first)
        own, head = dict(self.own), dict(self.head)
        found = [(decode[n] - head[n] - chunk[n] + own[n]) / n for n in _MEETING]
        return max(0.0, median(found))

    @cached_property
    def _body(self) -> Points:
        head = dict(self.head)
        few = [(n, s - head[n] - n * self.sequence_s) for n, s in self.decode if n < min(_MEETING)]
        own = dict(self.own)
        return [*few, *((n, s - own[n]) for n, s in self.first)]

    @property
    def whole_s(self) -> tuple[float, float]:
        """Of all that was measured: dense work, attention. They tell how fast a machine is, nothing else."""
        dense_s = sum(s for part in (self.decode, self.first, self.later) for _, s in part)
        return dense_s, sum(shape[3] for cost in self.attend.values() for shape in cost.shapes)

    def told(self) -> dict[str, Any]:
        """For a file."""
        points = {name: getattr(self, name) for name in _POINTS}
        return points | {"attend": {lanes: cost.shapes for lanes, cost in self.attend.items()}}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Calibration:
        """What child processes or `told` say."""
        points = {name: [(int(n), float(s)) for n, s in told[name]] for name in _POINTS}
        attend = {lanes: AttendCost([_shape(row) for row in rows]) for lanes, rows in told["attend"].items()}
        return cls(**points, attend=attend)


_POINTS = ("decode", "first", "later", "own", "head", "turns", "served", "passed_on")


def between(first: Calibration, second: Calibration) -> Calibration:
    """The means of two calibrations of the same parts."""
    return Calibration.of(_mean(first.told(), second.told()))


def apart(first: Calibration, second: Calibration) -> float:
    """How far a machine's speed has moved from the one to the other: 0.1 is a tenth."""
    return max(
        abs(later_s / earlier_s - 1)
        for earlier_s, later_s in zip(first.whole_s, second.whole_s, strict=True)
        if earlier_s
    )


def _mean(first: Any, second: Any) -> Any:
    if isinstance(first, Mapping):
        return {key: _mean(value, second[key]) for key, value in first.items()}
    if isinstance(first, Sequence):
        return [_mean(one, other) for one, other in zip(first, second, strict=True)]
    return (first + second) / 2


def _shape(row: Sequence[Any]) -> tuple[int, int, int, float, float, float]:
    sequences, rows, cached, attend_s, sent_s, lane_s = row
    return int(sequences), int(rows), int(cached), float(attend_s), float(sent_s), float(lane_s)


def _at(points: Points, size: int) -> float:
    """Between two sizes in proportion; beyond the last as from the two before; 0 of none."""
    if len(points) < _TELLING:
        return 0.0
    sizes = [known for known, _ in points]
    right = min(max(1, bisect_left(sizes, size)), len(points) - 1)
    (low, low_s), (high, high_s) = points[right - 1], points[right]
    return max(0.0, low_s + (high_s - low_s) * (size - low) / (high - low))


def _fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> Sequence[float]:
    """Least squares of relative differences, since sizes span decades."""
    weights = 1 / np.maximum(np.array(seconds), 1e-9)
    matrix = np.array(terms, dtype=np.float64) * weights[:, None]
    found: list[float] = np.linalg.lstsq(matrix, np.ones(len(weights)), rcond=None)[0].tolist()
    return found
