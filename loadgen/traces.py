"""Recorded traffic: times, lengths and shared blocks, read from the files that their owners publish.

| format | how it is recognised | has |
|---|---|---|
| Azure | CSV with TIMESTAMP, ContextTokens, GeneratedTokens | times, lengths |
| Mooncake | JSON lines: timestamp (ms), input_length, output_length, hash_ids | and blocks of 512 tokens |
| lengths | CSV with num_prefill_tokens, num_decode_tokens, or two bare numbers a line | lengths |
| ServeGen | a folder or .tar.gz of chunk-N-trace.csv and chunk-N-dataset.json | see `servegen` |
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import numpy as np

from cluster.errors import InvalidRequest
from loadgen.workload import Row

MOONCAKE_BLOCK_TOKENS = 512

_Cells: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Trace:
    """Rows in the order of their times."""

    rows: tuple[Row, ...]

    @property
    def is_timed(self) -> bool:
        """Whether rows have moments."""
        return bool(self.rows) and self.rows[0].at_s is not None

    def times_s(self) -> tuple[float, ...]:
        """The moments of all rows. Raises InvalidRequest where there are none."""
        if not self.is_timed:
            raise InvalidRequest("this trace has no times to replay: choose --arrivals poisson and a --rate")
        return tuple(row.at_s for row in self.rows if row.at_s is not None)

    def since(self, begins_s: float) -> Trace:
        """What comes at `begins_s` or later."""
        return Trace(tuple(row for row in self.rows if row.at_s is not None and row.at_s >= begins_s))

    def stamps_line(self) -> str:
        """A line that says how coarse the recorder's clock was, where it was; else empty."""
        times_s = self.times_s()
        different = len(set(times_s))
        if 2 * different > len(times_s):
            return ""
        return (
            f"the trace has {different:,} distinct moments for {len(times_s):,} requests, its clock was "
            "coarse: requests of one stamp are spread up to the next"
        )


def read(path: Path) -> Trace:
    """A trace of any format but ServeGen's. Raises InvalidRequest, naming file and line, where it is none."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}") from error
    try:
        return parse(lines)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error.message}") from error


def parse(lines: Iterable[str]) -> Trace:
    """The rows of a file's lines, of whichever format they are."""
    kept = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not kept:
        raise InvalidRequest("the trace is empty")
    read_row, body = _reader(kept[0][1]), kept
    if not kept[0][1].startswith("{") and not _is_bare(kept[0][1]):
        body = kept[1:]
    rows = []
    for number, line in body:
        try:
            rows.append(read_row(line))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise InvalidRequest(f"line {number} is no request of this format: {error!r}") from error
    return Trace(tuple(_from_zero(rows)))


def _reader(first: str) -> Callable[[str], Row]:
    """How lines are read, by the first one."""
    if first.startswith("{"):
        return _mooncake
    if _is_bare(first):
        return _bare
    names = next(csv.reader([first]))
    for wanted, reader in ((_AZURE, _azure), (_LENGTHS, _lengths)):
        if set(wanted) <= set(names):
            return lambda line: reader(dict(zip(names, next(csv.reader([line])), strict=True)))
    raise InvalidRequest(
        f"unknown columns {first!r}: expected {', '.join(_AZURE)} or {', '.join(_LENGTHS)}, "
        "two numbers a line, or Mooncake's JSON lines"
    )


_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_LENGTHS = ("num_prefill_tokens", "num_decode_tokens")


def _is_bare(line: str) -> bool:
    return all(word.isdigit() for word in line.replace(",", " ").split())


def _azure(cells: _Cells) -> Row:
    at_s = datetime.fromisoformat(cells["TIMESTAMP"]).replace(tzinfo=UTC).timestamp()
    return _row(int(cells["ContextTokens"]), int(cells["GeneratedTokens"]), at_s)


def _lengths(cells: _Cells) -> Row:
    return _row(int(cells["num_prefill_tokens"]), int(cells["num_decode_tokens"]), None)


def _bare(line: str) -> Row:
    prompt, output = map(int, line.replace(",", " ").split())
    return _row(prompt, output, None)


def _mooncake(line: str) -> Row:
    values = json.loads(line)
    blocks = tuple(map(int, values["hash_ids"]))
    at_s = float(values["timestamp"]) / 1000
    prompt, output = int(values["input_length"]), int(values["output_length"])
    return Row(max(1, prompt), max(1, output), at_s, blocks=blocks, block_tokens=MOONCAKE_BLOCK_TOKENS)


def _row(prompt: int, output: int, at_s: float | None) -> Row:
    """A recorded length of 0 (an answer that was cut off before it began) becomes 1."""
    return Row(max(1, prompt), max(1, output), at_s)


def _from_zero(rows: list[Row]) -> list[Row]:
    """The rows by time, the first at 0."""
    if not rows or rows[0].at_s is None:
        return rows
    times_s = np.array([row.at_s for row in rows], dtype=np.float64)
    order = np.argsort(times_s, kind="stable")
    return [replace(rows[place], at_s=float(times_s[place] - times_s.min())) for place in order]
