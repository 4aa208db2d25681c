"""One step's rows at this worker, resolved once when the plan arrives and used for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import Fenced, InvalidRequest
from cluster.types import Generation
from workers.attention.arena import Arena
from workers.attention.shard import LayerArrival, Shard
from workers.attention.store import Store
from workers.kernels.signature import Kernel, Span
from workers.lanes.messages import PlanRow
from workers.partials import Partial


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A plan row's shard, the generation it was named under, and the first position it sees."""

    shard: Shard
    generation: Generation
    sees_from: int

    @property
    def is_trimmed(self) -> bool:
        """Whether the shard gave up something the row sees. What it writes is still there: a trim never
        reaches beyond what is certain, an append never below it.
        """
        return self.sees_from < self.shard.first


class PreparedStep:
    """Spans and slots of one step of one lane.

    `begin` commits, checks every visible range and announces the appends; `append` and `attend` then run
    without looking at a sequence, except to see that no shard was taken away in between. All methods
    are called with the store's turn held.
    """

    def __init__(self, store: Store, arena: Arena, rows: Sequence[PlanRow]) -> None:
        """Resolve the rows. Raises Fenced naming every shard that is gone, taken over or incomplete, and
        InvalidRequest for rows that contradict themselves; no append is announced then.
        """
        self._store = store
        self._arena = arena
        self._arrival = LayerArrival(arena.geometry.layers)
        self._resolved = _resolve_all(store, rows)
        self._appended = [len(row.token_ids) for row in rows]
        self._lost: list[Shard] = []
        self._changes = store.changes
        self.spans = _spans(rows, self._resolved)
        self.rows = sum(row.count for row in rows if row.sees)
        self._slots = self._announce(rows)
        self._kept: Tensor | None = None
        """Which of the appended rows still have their shard, bool; None: all."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write one layer of the step's chunks: [appended rows, kv_heads, head_size] each. Raises Fenced.

        Rows whose shard was released or taken over meanwhile are left out: a request that is aborted
        behind its step must not cost the others theirs.
        """
        expected = (len(self._slots), self._arena.geometry.kv_heads, self._arena.geometry.head_size)
        if tuple(key.shape) != expected or tuple(value.shape) != expected:
            raise InvalidRequest(
                f"keys {tuple(key.shape)}, values {tuple(value.shape)} where {expected} are due"
            )
        self._arrival.check(layer)
        self._leave_out_lost()
        if self._kept is None:
            self._arena.append(layer, self._slots, key, value)
        else:
            slots, kept = self._slots[self._kept], self._kept.to(key.device)
            self._arena.append(layer, slots, key[kept], value[kept])
        self._arrival.mark(layer)  # not before: a layer that failed half-way has not arrived

    def attend(
        self, layer: int, query: Tensor, spans: Sequence[Span], kernel: Kernel, window: int | None
    ) -> Partial:
        """Attend `query` (all rows of the step that see something) over `spans`, some or all of the step's.
        Raises Fenced.
        """
        if self._leave_out_lost():
            what = "was released or taken over, or trimmed, during a step"
            raise _joined([shard.fenced(what) for shard in self._lost])
        scale = self._arena.geometry.head_size**-0.5
        result = kernel.attend(query.to(self._arena.device), spans, self._arena.layer(layer), scale, window)
        return Partial(result.out, result.lse)

    @property
    def slots(self) -> Tensor:
        """Where the step's chunks are written, flat, int64 [appended rows]."""
        return self._slots

    def stands(self, appended: int | None) -> bool:
        """Whether a message needs no look: no shard of the store changed hands since the plan came, and the
        keys and values it may bring are those of the layer that is due.
        """
        is_due = appended is None or self._arrival.is_due(appended)
        return is_due and self._changes == self._store.changes and not self._lost

    def mark(self, layer: int) -> None:
        """`layer` has been written, by somebody else than `append`."""
        self._arrival.mark(layer)

    def _leave_out_lost(self) -> bool:
        """Look for lost shards if any shard of the store changed hands; whether this step lost one."""
        if self._changes != self._store.changes:
            self._changes = self._store.changes
            held = [self._store.is_held(row.shard, row.generation) for row in self._resolved]
            self._lost = [
                row.shard
                for row, is_held in zip(self._resolved, held, strict=True)
                if not is_held or row.is_trimmed
            ]
            if not all(held):
                kept = [
                    is_held for is_held, count in zip(held, self._appended, strict=True) for _ in range(count)
                ]
                self._kept = torch.tensor(kept, dtype=torch.bool, device=self._arena.device)
        return bool(self._lost)

    def _announce(self, rows: Sequence[PlanRow]) -> Tensor:
        """Begin the appends of tail rows; flat slots of their positions, int64 [appended rows]."""
        slots: list[int] = []
        for row, resolved in zip(rows, self._resolved, strict=True):
            if row.token_ids:
                resolved.shard.append(row.start, row.token_ids, self._arrival)
                slots += [resolved.shard.slot(row.start + offset) for offset in range(row.count)]
        return torch.tensor(slots, dtype=torch.int64, device=self._arena.device)


def _resolve_all(store: Store, rows: Sequence[PlanRow]) -> list[_Resolved]:
    if len({row.shard for row in rows}) != len(rows):
        raise InvalidRequest("a plan names a shard twice")
    resolved: list[_Resolved] = []
    faults: list[Fenced] = []
    for row in rows:
        try:
            resolved.append(_resolve(store, row))
        except Fenced as fault:
            faults.append(fault)
    if faults:
        raise _joined(faults)
    return resolved


def _joined(faults: Sequence[Fenced]) -> Fenced:
    """One error for all shards at fault, so that a step learns of them at once."""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Fenced(faults[0].message + more, shards=",".join(fault.metadata["shards"] for fault in faults))


def _resolve(store: Store, row: PlanRow) -> _Resolved:
    generation = Generation(row.generation)
    shard = store.shard(row.shard, generation)
    if row.count < 1 or row.start < 0 or (row.token_ids and len(row.token_ids) != row.count):
        raise InvalidRequest(f"{shard.key}: {row.count} rows at {row.start} with {len(row.token_ids)} ids")
    store.commit(shard, row.start)
    _check_visible(shard, row)
    if row.token_ids:
        shard.check_append(row.start, row.start + row.count)
    return _Resolved(shard, generation, row.visible_first if row.sees else row.start)


def _check_visible(shard: Shard, row: PlanRow) -> None:
    """The shard attends exactly the named range, or fails closed."""
    if row.visible_end > row.start or row.visible_first > row.visible_end:
        raise InvalidRequest(f"{shard.key}: visible {row.visible_first}..{row.visible_end} at {row.start}")
    if row.visible_first == row.visible_end:
        return
    if row.visible_first < shard.first or row.visible_end > shard.committed:
        raise shard.fenced(
            f"visible {row.visible_first}..{row.visible_end}, held {shard.first}..{shard.committed}"
        )


def _spans(rows: Sequence[PlanRow], resolved: Sequence[_Resolved]) -> list[Span]:
    spans: list[Span] = []
    row_start = 0
    for row, held in zip(rows, resolved, strict=True):
        shard = held.shard
        if row.sees:
            last = -(-(row.visible_end - shard.first) // shard.block_tokens)
            spans.append(
                Span(
                    row_start=row_start,
                    row_count=row.count,
                    query_position=row.start,
                    blocks=tuple(shard.blocks[:last]),
                    first_position=shard.first,
                    visible_start=row.visible_first - shard.first,
                    visible_end=row.visible_end - shard.first,
                )
            )
            row_start += row.count
    return spans


def slices(spans: Sequence[Span], rows_most: int) -> list[list[Span]]:
    """The spans in groups of at most `rows_most` query rows, long chunks cut, so that lanes take turns."""
    assert rows_most > 0
    groups: list[list[Span]] = [[]]
    room = rows_most
    for span in spans:
        done = 0
        while done < span.row_count:
            if room == 0:
                groups.append([])
                room = rows_most
            count = min(room, span.row_count - done)
            groups[-1].append(_cut(span, done, count))
            done += count
            room -= count
    return groups


def _cut(span: Span, skip: int, count: int) -> Span:
    if skip == 0 and count == span.row_count:
        return span
    return Span(
        row_start=span.row_start + skip,
        row_count=count,
        query_position=span.query_position + skip,
        blocks=span.blocks,
        first_position=span.first_position,
        visible_start=span.visible_start,
        visible_end=span.visible_end,
    )
