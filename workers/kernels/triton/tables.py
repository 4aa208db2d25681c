"""What the kernels are told about a batch: its spans cut into items, as tables on the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.signature import Span
from workers.kernels.triton.tiling import programs_wanted, rows_of, slots_of, split_slots

ITEM_FIELDS = 8
ROW_FIELDS = 4
_ALIGNED = 4
"""Tables start at multiples of 16 bytes: pointers less aligned would each compile another kernel."""

Ints = NDArray[np.int32]

_NO_BLOCKS: Ints = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class SpanTables:
    """One batch on the device, all int32.

    items: by packed rows per tile, [items, ITEM_FIELDS]: the work of stage one, for each tile and split
        0 first row of the span in the batch    4 first slot of the split
        1 packed rows of the span               5 slot after its last
        2 first packed row of the tile          6 where its ids begin in `blocks`; of a chunk the first row
        3 the first row's own place in slots    7 first partial row of the item
    rows: [rows, ROW_FIELDS], what stage two sums for each row of the batch
        0 first partial row of its span         2 splits; 0 for a row of no span
        1 its number in the span                3 packed rows per tile
    blocks: the spans' block ids, one span after the other. partial_rows: rows of the buffers in between.
    """

    items: dict[int, Tensor]
    rows: Tensor
    blocks: Tensor
    partial_rows: int
    are_chunks: bool


@dataclass(frozen=True, slots=True)
class Cutting:
    """What the cutting of a batch depends on besides its spans."""

    query_heads: int
    kv_heads: int
    head_size: int
    element_bytes: int
    split_slots_least: int


def tables_of_spans(
    spans: Sequence[Span], rows: int, window: int | None, cutting: Cutting, device: torch.device
) -> SpanTables:
    """Tables of `rows` rows over cached blocks."""
    starts = np.cumsum([0, *(len(span.blocks) for span in spans)]).tolist()
    cuts = [_cut_of(span, window, start) for span, start in zip(spans, starts, strict=False)]
    blocks = np.concatenate([_NO_BLOCKS, *(np.asarray(span.blocks, np.int32) for span in spans)])
    return _cut_up(cuts, rows, blocks, cutting, device, are_chunks=False)


def tables_of_chunks(chunks: Sequence[int], cutting: Cutting, device: torch.device) -> SpanTables:
    """Tables of consecutive chunks over themselves, whatever the window."""
    starts = np.cumsum([0, *chunks]).tolist()
    cuts = [_Cut(start, count, 0, 0, count, start) for start, count in zip(starts, chunks, strict=False)]
    return _cut_up(cuts, starts[-1], _NO_BLOCKS, cutting, device, are_chunks=True)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Rows of the batch, and the slots the first of them sees; see `SpanTables.items`."""

    row_start: int
    row_count: int
    place: int
    slot_start: int
    slot_stop: int
    table_start: int


def _cut_of(span: Span, window: int | None, table_start: int) -> _Cut:
    place = span.query_position - span.first_position
    oldest = 0 if window is None else place - window + 1
    slot_start = max(span.visible_start, oldest)
    return _Cut(span.row_start, span.row_count, place, slot_start, span.visible_end, table_start)


def _cut_up(
    cuts: Sequence[_Cut], rows: int, blocks: Ints, cutting: Cutting, device: torch.device, *, are_chunks: bool
) -> SpanTables:
    """Tiles and splits of all cuts, on the device."""
    group = cutting.query_heads // cutting.kv_heads
    step = slots_of(cutting.head_size, cutting.element_bytes)
    seeing = [cut for cut in cuts if cut.slot_start < cut.slot_stop]
    tiles = [-(-cut.row_count * group // rows_of(cut.row_count * group)) for cut in seeing]
    work = sum(count * (cut.slot_stop - cut.slot_start) for cut, count in zip(seeing, tiles, strict=True))
    split = split_slots(
        work * cutting.kv_heads, programs_wanted(device), max(step, cutting.split_slots_least), step
    )
    row_table = np.tile(np.array([0, 0, 0, 1], np.int32), (rows, 1))  # rows of no span: nothing to sum
    items: dict[int, list[Ints]] = {}
    partial_rows = 0
    for cut, tile_count in zip(seeing, tiles, strict=True):
        tile_rows = rows_of(cut.row_count * group)
        slots = _even_splits(cut, split, step)
        own = row_table[cut.row_start : cut.row_start + cut.row_count]
        own[:] = partial_rows, 0, len(slots), tile_rows
        own[:, 1] = np.arange(cut.row_count)
        items.setdefault(tile_rows, []).append(
            _items(cut, cut.row_count * group, tile_rows, tile_count, slots, partial_rows, cutting.kv_heads)
        )
        partial_rows += tile_count * len(slots) * cutting.kv_heads * tile_rows
    heights = sorted(items)
    *item_tables, row_tensor, block_tensor = _on_device(
        [*(np.concatenate(items[height]) for height in heights), row_table, blocks], device
    )
    by_height = dict(zip(heights, item_tables, strict=True))
    return SpanTables(by_height, row_tensor, block_tensor, partial_rows, are_chunks)


def _even_splits(cut: _Cut, longest: int, step: int) -> Ints:
    """[splits, 2]: first slot and slot after the last, of splits of about equal length, `step` slots each."""
    slots = cut.slot_stop - cut.slot_start
    splits = -(-slots // longest)
    length = -(-slots // (splits * step)) * step
    starts = np.arange(cut.slot_start, cut.slot_stop, length, dtype=np.int32)
    return np.stack((starts, np.minimum(starts + length, cut.slot_stop)), 1).astype(np.int32)


def _items(
    cut: _Cut, packed_rows: int, tile_rows: int, tiles: int, slots: Ints, partial_row: int, kv_heads: int
) -> Ints:
    """One row for each tile and split, the splits of a tile one after the other."""
    splits = len(slots)
    table = np.empty((tiles, splits, ITEM_FIELDS), np.int32)
    table[..., 0], table[..., 1] = cut.row_start, packed_rows
    table[..., 2] = np.arange(tiles)[:, None] * tile_rows
    table[..., 3] = cut.place
    table[..., 4:6] = slots
    table[..., 6] = cut.table_start
    numbers = np.arange(tiles * splits).reshape(tiles, splits)
    table[..., 7] = partial_row + numbers * kv_heads * tile_rows
    return table.reshape(-1, ITEM_FIELDS)


def _on_device(tables: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """Each table on the device, all in one transfer."""
    starts = np.cumsum([0, *(-(-table.size // _ALIGNED) * _ALIGNED for table in tables)]).tolist()
    packed = np.zeros(starts[-1], np.int32)
    for start, table in zip(starts, tables, strict=False):
        packed[start : start + table.size] = table.reshape(-1)
    there = torch.from_numpy(packed)
    if device.type == "cuda":
        there = there.pin_memory().to(device, non_blocking=True)
    return [
        there[start : start + table.size].view(table.shape)
        for start, table in zip(starts, tables, strict=False)
    ]


class TableMemo:
    """The tables of the last few batches, since all layers of a step ask for the same. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, tuple[SpanTables, object]] = OrderedDict()

    def get(self, key: Hashable, keeps: object, build: Callable[[], SpanTables]) -> SpanTables:
        """The tables under `key`, built if there are none; `keeps` lives as long as they are held, so that
        a key may name its parts by `id`.
        """
        with self._lock:
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                return held[0]
        tables = build()
        with self._lock:
            self._held[key] = tables, keeps
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return tables


def key_of(span: Span) -> Hashable:
    """What a span says, its blocks by identity where they cannot change: hashing them takes longer than
    many a kernel.
    """
    blocks = id(span.blocks) if isinstance(span.blocks, tuple) else tuple(span.blocks)
    return (
        span.row_start,
        span.row_count,
        span.query_position,
        blocks,
        span.first_position,
        span.visible_start,
        span.visible_end,
    )
