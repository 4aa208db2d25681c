"""Who attends which rows of a step: resolved once per step, so that the layers look at no sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.model_spec import ModelSpec, widest_window
from cluster.types import SequenceKey, WorkerId
from workers.dense.sequences import LiveSequence, Placed
from workers.lanes.messages import PlanRow

RowIndex = slice | Tensor
"""Rows of a step: a slice where they are consecutive (no copy), int64 [n] otherwise."""

_FLOPS_OF_A_SLOW_WORKER = 1e9
"""For deadlines only: one core without vector units attends at least this fast."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's new tokens of a step, at rows offset..offset+count of it."""

    sequence: LiveSequence
    start: int
    count: int
    samples: bool
    offset: int

    @property
    def key(self) -> SequenceKey:
        """The sequence's."""
        return self.sequence.key

    @property
    def rows(self) -> range:
        """Its rows in the step."""
        return range(self.offset, self.offset + self.count)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens it computes."""
        return tuple(self.sequence.token_ids[self.start : self.start + self.count])


@dataclass(frozen=True, slots=True)
class WorkerPart:
    """One attention worker's part of a step.

    queries: the step's rows that see anything there, in plan order; None where none does.
    places: int64 [queries], where each reply row goes: part number x step rows + row.
    appends: the step's rows it appends, or None. score_count: scores it computes per head and layer.
    """

    worker: WorkerId
    plan: tuple[PlanRow, ...]
    queries: RowIndex | None
    places: Tensor
    appends: RowIndex | None
    score_count: int

    def predicted_s(self, spec: ModelSpec) -> float:
        """Seconds a slow worker takes for one layer: 4 FLOP per score and element of a head."""
        flops = 4 * self.score_count * spec.query_heads * spec.head_size
        return flops / _FLOPS_OF_A_SLOW_WORKER


@dataclass(frozen=True, slots=True)
class StepLayout:
    """chunk_sizes: row counts of the consecutive chunks. rows: tokens of the step; parts_most: the most
    shards any row sees. is_direct: one worker answers, for all rows in their order, so that its reply needs
    no sorting.
    """

    chunks: tuple[Chunk, ...]
    chunk_sizes: tuple[int, ...]
    rows: int
    parts_most: int
    workers: tuple[WorkerPart, ...]
    is_direct: bool

    @property
    def are_single_rows(self) -> bool:
        """Whether every chunk is one row, which of its step's tokens sees only itself: a decoding step."""
        return self.rows == len(self.chunks)

    def token_ids(self, device: torch.device) -> Tensor:
        """int64 [rows]."""
        ids = [token_id for chunk in self.chunks for token_id in chunk.token_ids]
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [rows]."""
        places = [p for chunk in self.chunks for p in range(chunk.start, chunk.start + chunk.count)]
        return torch.tensor(places, dtype=torch.int64, device=device)

    def last_rows(self, chunks: Iterable[Chunk], device: torch.device) -> Tensor:
        """int64: the last row of each of the chunks."""
        return torch.tensor([chunk.rows[-1] for chunk in chunks], dtype=torch.int64, device=device)


def lay_out(
    chunks: Sequence[Chunk], windows: Sequence[int | None], order: Sequence[WorkerId], device: torch.device
) -> StepLayout:
    """The layout of a step. `windows`: per layer; `order`: the workers involved, first to send to first."""
    rows = sum(chunk.count for chunk in chunks)
    reach = widest_window(windows)
    drafts = {worker: _Draft() for worker in order}
    parts_most = 0
    for chunk in chunks:
        seen = 0
        for placed in chunk.sequence.shards:
            seen += drafts[placed.shard.worker].add(chunk, placed, reach, seen * rows)
        parts_most = max(parts_most, seen)
    workers = tuple(draft.finish(worker, device) for worker, draft in drafts.items() if draft.plan)
    is_direct = len(workers) == 1 and workers[0].places.tolist() == list(range(rows))
    sizes = tuple(chunk.count for chunk in chunks)
    return StepLayout(tuple(chunks), sizes, rows, parts_most, workers, is_direct)


def offset_anew(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same chunks as a step of their own: rows counted from the first of them."""
    offsets = itertools.accumulate((chunk.count for chunk in chunks), initial=0)
    return [replace(chunk, offset=offset) for chunk, offset in zip(chunks, offsets, strict=False)]


def workers_of(chunks: Iterable[Chunk]) -> set[WorkerId]:
    """The workers that hold anything of the chunks' sequences."""
    return {placed.shard.worker for chunk in chunks for placed in chunk.sequence.shards}


class _Draft:
    """A worker's part while it is laid out."""

    def __init__(self) -> None:
        self.plan: list[PlanRow] = []
        self._queries: list[int] = []
        self._places: list[int] = []
        self._appends: list[int] = []
        self._score_count = 0

    def add(self, chunk: Chunk, placed: Placed, reach: int | None, place: int) -> int:
        """Add the plan row of a chunk at one shard, if it has any part in the chunk; 1 if it sees something,
        so that its queries go there and partials come back.

        The shard is seen from where the widest window reaches to (no window: from its start), and
        appended to if the chunk starts in it.
        """
        shard = placed.shard
        end = min(shard.end, chunk.start)
        first = shard.first if reach is None else max(shard.first, chunk.start - reach + 1)
        sees = first < end
        appends = shard.first <= chunk.start < shard.end
        if not sees and not appends:
            return 0
        assert not appends or chunk.start + chunk.count <= shard.end, "a chunk never leaves its shard"
        if not sees:
            first = end = min(max(shard.first, first), chunk.start)
        token_ids = chunk.token_ids if appends else ()
        row = PlanRow(shard.shard, placed.generation, chunk.start, chunk.count, first, end, token_ids)
        self.plan.append(row)
        if appends:
            self._appends += chunk.rows
        if not sees:
            return 0
        self._queries += chunk.rows
        self._places += [place + row for row in chunk.rows]
        self._score_count += chunk.count * (end - first)
        return 1

    def finish(self, worker: WorkerId, device: torch.device) -> WorkerPart:
        """The part as the layers use it."""
        return WorkerPart(
            worker,
            tuple(self.plan),
            _index(self._queries, device) if self._queries else None,
            torch.tensor(self._places, dtype=torch.int64, device=device),
            _index(self._appends, device) if self._appends else None,
            self._score_count,
        )


def _index(rows: list[int], device: torch.device) -> RowIndex:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.int64, device=device)
