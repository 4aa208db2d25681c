"""What a machine takes for the parts of a step, as `anabranch loadgen calibrate` measured them. Pure.

Parts only, each by itself: nothing here comes from a run that is to be predicted.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np

from cluster.errors import ConfigError

Points: TypeAlias = Sequence[tuple[int, float]]
"""(size, seconds), ascending."""

Shapes: TypeAlias = Sequence[tuple[int, int, int, float, float, float]]
"""(sequences, rows and cached tokens of each; seconds of attending, of handing over, of the lane else)."""

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
    others; `own`: attention of a chunk over itself; `head`: head and sampler. `local`: attention
    in the dense process; `remote`: in another, whose lanes ask for bytes before they sleep; `asleep`: whose
    lanes do not. `turns`: of their core, what asking that one about so many rows takes a dense worker that
    shares it: handing over, taking back, and finding its caches cold, since another computed meanwhile.
    `read_bytes_per_s`: what memory gave one core while all this was measured; nothing is predicted from it.
    """

    model: str
    machine: Mapping[str, Any]
    read_bytes_per_s: float
    decode: Points
    first: Points
    later: Points
    own: Points
    head: Points
    turns: Points
    local: AttendCost
    remote: AttendCost
    asleep: AttendCost

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

    def to_json(self) -> str:
        """For a file."""
        told = {name: getattr(self, name) for name in ("model", "machine", _READ, *_POINTS)}
        told |= {name: getattr(self, name).shapes for name in _SHAPES}
        return json.dumps(told, indent=1)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Calibration:
        """What `to_json` wrote, or the command's child processes."""
        decode, first, later, own, head, turns = (
            [(int(n), float(s)) for n, s in told[name]] for name in _POINTS
        )
        local, remote, asleep = (AttendCost([_shape(row) for row in told[name]]) for name in _SHAPES)
        parts = decode, first, later, own, head, turns, local, remote, asleep
        return cls(told["model"], told["machine"], float(told[_READ]), *parts)

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """A file of `anabranch loadgen calibrate`. Raises ConfigError."""
        try:
            return cls.from_json(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: holds no calibration: {error}; `anabranch loadgen calibrate {path}` writes one"
            ) from error


_READ = "read_bytes_per_s"
_POINTS = ("decode", "first", "later", "own", "head", "turns")
_SHAPES = ("local", "remote", "asleep")


def _shape(row: Sequence[Any]) -> tuple[int, int, int, float, float, float]:
    sequences, rows, cached, attend_s, sent_s, lane_s = row
    return int(sequences), int(rows), int(cached), float(attend_s), float(sent_s), float(lane_s)


def _at(points: Points, size: int) -> float:
    """Between two sizes in proportion; beyond the last as from the two before."""
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
