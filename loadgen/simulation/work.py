"""What a plan's rows ask of both sides. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from cluster.types import SequenceKey

Places: TypeAlias = Sequence[tuple[int, int, int]]
"""(arena, first, end) of a sequence's shards, in order: what a step reads."""


@dataclass(slots=True)
class PlannedRow:
    """A row of a plan, and where its sequence lies. Not frozen: building those of every step, much of what a
    simulation does, would take three times as long.
    """

    key: SequenceKey
    start: int
    """Its tokens before the step."""
    count: int
    """Tokens that the step computes."""
    samples: bool
    """Whether it goes through the head."""
    places: Places


@dataclass(slots=True)
class Work:
    """What a step does. Lists are by attention worker (one, where the cache is local)."""

    tokens: int = 0
    """Through the dense operators: decoding rows, and the tokens of chunks."""
    own_scores: int = 0
    """Pairs of tokens within chunks: attention inside the dense worker."""
    read_tokens: list[int] = field(default_factory=list)
    """Cache read for decoding rows, each with one query."""
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    """(attention worker, tokens, cached tokens there) of chunks; 0 cached where one is only appended."""
    queries: list[int] = field(default_factory=list)
    """Tokens whose queries go there, and whose partial outputs come back."""
    appended: list[int] = field(default_factory=list)
    """Tokens whose keys and values go there."""
    sequences: int = 0
    samples: int = 0
    """Rows that go through the head."""
    chunk_tokens: list[int] = field(default_factory=list)
    """Of chunks of more than one token."""


def work_of(rows: Sequence[PlannedRow], workers: int) -> Work:
    """All that a step's rows ask for."""
    work = Work(0, 0, [0] * workers, [], [0] * workers, [0] * workers)
    for row in rows:
        if row.count == 1:
            _add_row(work, row)
        else:
            _add_chunk(work, row)
        work.sequences += 1
        work.samples += row.samples
    return work


def last_rows(rows: Sequence[PlannedRow]) -> list[PlannedRow]:
    """What is left of a step whose chunks were computed elsewhere: those that sample, with one token each."""
    return [
        replace(row, start=row.start + row.count - 1, count=1)
        for row in rows
        if row.count == 1 or row.samples
    ]


def _add_row(work: Work, row: PlannedRow) -> None:
    """One token reads all before it, and is appended."""
    work.tokens += 1
    start = row.start
    for arena, first, end in row.places:
        if end > start:
            work.appended[arena] += 1
            if first < start:
                work.read_tokens[arena] += start - first
                work.queries[arena] += 1
            return
        work.read_tokens[arena] += end - first
        work.queries[arena] += 1


def _add_chunk(work: Work, row: PlannedRow) -> None:
    """A chunk reads what lies before it where it lies, attends to itself, and is appended."""
    work.tokens += row.count
    work.own_scores += row.count * (row.count + 1) // 2
    work.chunk_tokens.append(row.count)
    for arena, first, end in row.places:
        cached = min(end, row.start) - first
        if cached > 0:
            work.queries[arena] += row.count
        is_tail = end > row.start
        if cached > 0 or is_tail:
            work.chunks.append((arena, row.count, max(0, cached)))
        if is_tail:
            work.appended[arena] += row.count
            return
