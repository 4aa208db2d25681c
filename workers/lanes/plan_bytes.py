"""The bytes of a plan difference inside a frame, little-endian:

step u64, base step u64 (2^64 - 1: none), removed u32, advanced u32, changed u32, pad u32
removed:   shard u64, each
advanced:  shard u64, tokens u32, each; then all their token ids u32
changed:   shard u64, generation, start, count, visible first, visible end, tokens u32, each;
           then all their token ids u32
zeros to a multiple of 16, so that the tensors after it stay aligned
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from cluster.errors import InvalidRequest, LaneBroken
from cluster.types import Generation, ShardId
from workers.lanes.messages import PlanRow, StepPlanDifference

_HEAD = struct.Struct("<QQIIII")
_REMOVED = struct.Struct("<Q")
_ADVANCED = struct.Struct("<QI")
_CHANGED = struct.Struct("<QIIIIII")
_NO_BASE = 2**64 - 1
PLAN_ALIGNMENT = 16


def pack_plan(plan: StepPlanDifference) -> bytes:
    """Raises InvalidRequest when a number does not fit its field."""
    base = _NO_BASE if plan.base_step is None else plan.base_step
    counts = (len(plan.removed), len(plan.advanced), len(plan.changed))
    try:
        parts = [_HEAD.pack(plan.step, base, *counts, 0)]
        parts += [_REMOVED.pack(shard) for shard in plan.removed]
        parts += [_ADVANCED.pack(shard, len(tokens)) for shard, tokens in plan.advanced]
        parts.append(_pack_tokens([token for _, tokens in plan.advanced for token in tokens]))
        parts += [_pack_row(row) for row in plan.changed]
        parts.append(_pack_tokens([token for row in plan.changed for token in row.token_ids]))
    except (struct.error, OverflowError) as error:
        raise InvalidRequest(f"a plan has a number that does not fit its field: {error}") from error
    size = sum(map(len, parts))
    parts.append(bytes(-size % PLAN_ALIGNMENT))
    return b"".join(parts)


def unpack_plan(data: memoryview) -> StepPlanDifference:
    """Raises LaneBroken when the bytes are no plan."""
    reader = _Reader(data)
    step, base, removed_count, advanced_count, changed_count, _ = reader.take(_HEAD, 1)[0]
    removed = tuple(ShardId(shard) for (shard,) in reader.take(_REMOVED, removed_count))
    heads = reader.take(_ADVANCED, advanced_count)
    token_lists = reader.take_tokens([count for _, count in heads])
    advanced = tuple((ShardId(shard), tokens) for (shard, _), tokens in zip(heads, token_lists, strict=True))
    fields = reader.take(_CHANGED, changed_count)
    token_lists = reader.take_tokens([row[-1] for row in fields])
    changed = tuple(_row(row, tokens) for row, tokens in zip(fields, token_lists, strict=True))
    reader.expect_end()
    return StepPlanDifference(step, None if base == _NO_BASE else base, removed, advanced, changed)


def _pack_row(row: PlanRow) -> bytes:
    return _CHANGED.pack(
        row.shard,
        row.generation,
        row.start,
        row.count,
        row.visible_first,
        row.visible_end,
        len(row.token_ids),
    )


def _row(fields: tuple[int, ...], token_ids: tuple[int, ...]) -> PlanRow:
    shard, generation, start, count, visible_first, visible_end, _ = fields
    return PlanRow(
        ShardId(shard), Generation(generation), start, count, visible_first, visible_end, token_ids
    )


def _pack_tokens(token_ids: Sequence[int]) -> bytes:
    return np.array(token_ids, dtype="<u4").tobytes()


class _Reader:
    """Takes structs off the front, never beyond the end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._offset = 0

    def take(self, layout: struct.Struct, count: int) -> list[tuple[int, ...]]:
        """`count` structs."""
        part = self._advance(layout.size * count)
        return list(layout.iter_unpack(part))

    def take_tokens(self, counts: Sequence[int]) -> list[tuple[int, ...]]:
        """Token ids, as many lists as counts."""
        part = self._advance(4 * sum(counts))
        flat = np.frombuffer(part, dtype="<u4").tolist()
        lists: list[tuple[int, ...]] = []
        start = 0
        for count in counts:
            lists.append(tuple(flat[start : start + count]))
            start += count
        return lists

    def expect_end(self) -> None:
        """Only the padding may be left."""
        left = bytes(self._data[self._offset :])
        if len(left) >= PLAN_ALIGNMENT or any(left) or len(self._data) % PLAN_ALIGNMENT:
            raise LaneBroken("a plan is longer than it says")

    def _advance(self, size: int) -> memoryview:
        end = self._offset + size
        if end > len(self._data):
            raise LaneBroken("a plan is shorter than it says")
        part = self._data[self._offset : end]
        self._offset = end
        return part
