"""Stage one: a tile of query rows over a stretch of slots gives a partial (FlashDecoding's split).

Online softmax as in FlashAttention (arXiv 2205.14135, algorithm 1); the (out, lse) form of what a split gives
is DistAttention's, here within one device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.arithmetic import exponential, product
from workers.kernels.triton.tables import ITEM_FIELDS, SpanTables
from workers.kernels.triton.tiling import padded, slots_of, stages_of, warps_of

_ITEM_FIELDS = tl.constexpr(ITEM_FIELDS)

_NO_WINDOW = 2**30
"""A window no sequence fills: models with and without windows share one compiled kernel."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: SpanTables,
    scale: float,
    window: int | None,
    partials: tuple[Tensor, Tensor],
) -> None:
    """Launch stage one for every height of tiles in use.

    query: [rows, query_heads, head_size], contiguous. key, value: [blocks, block_tokens, kv_heads, head_size]
    or, where the tables are those of chunks, [rows, kv_heads, head_size]; the heads of a slot are adjacent.
    partials: float32 out [partial rows, head_size] and lse [partial rows], as many as the tables say.
    """
    kv_heads, head_size = key.shape[-2:]
    assert query.is_contiguous(), "query rows are adjacent"
    for part in (key, value):
        assert part.stride()[-2:] == (head_size, 1), f"heads {part.stride()} apart"
    for rows, items in tables.items.items():
        _attend_tiles[(items.shape[0], kv_heads)](
            query,
            key,
            value,
            *partials,
            items,
            tables.blocks,
            key.stride(-3),
            value.stride(-3),
            scale,
            _NO_WINDOW if window is None else window,
            GROUP=query.shape[1] // kv_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=padded(head_size),
            BLOCK_TOKENS=0 if tables.are_chunks else key.shape[1],
            ROWS=rows,
            SLOTS=slots_of(head_size, key.element_size()),
            PRECISE=key.element_size() == 4,
            WIDEN=query.device.type == "cpu",
            num_warps=warps_of(rows),
            num_stages=stages_of(rows),
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize=["window"])
def _attend_tiles(
    query,
    key,
    value,
    partial_out,
    partial_lse,
    items,
    tables,
    key_stride,
    value_stride,
    scale,
    window,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Grid: (items, KV heads). Writes ROWS partial rows from where the item says.

    Packed row p of a span is its row p // GROUP under the p % GROUP-th query head of the KV head.
    BLOCK_TOKENS 0: the slots are a chunk's own rows, each seen up to itself; else `tables` names the blocks.
    """
    item = items + tl.program_id(0) * _ITEM_FIELDS
    kv_head = tl.program_id(1)
    packed_first = tl.load(item + 2)
    slot_stop = tl.load(item + 5)
    table_start = tl.load(item + 6)
    packed = packed_first + tl.arange(0, ROWS)
    place = tl.load(item + 3) + packed // GROUP  # the row's own place among the slots
    # Slots before the first row's window are not read, nor those after a chunk's last row.
    slot_start = tl.maximum(tl.load(item + 4), tl.load(item + 3) + packed_first // GROUP - window + 1)
    if BLOCK_TOKENS == 0:
        slot_stop = tl.minimum(slot_stop, (packed_first + ROWS - 1) // GROUP + 1)

    row = (tl.load(item) + packed // GROUP).to(tl.int64)
    head = kv_head * GROUP + packed % GROUP
    place_of_row = (row * tl.num_programs(1) * GROUP + head) * HEAD_SIZE
    queries = _rows(query, place_of_row, packed < tl.load(item + 1), HEAD_SIZE, HEAD_PADDED)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for first in range(slot_start, slot_stop, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        is_slot = slot < slot_stop
        seen = is_slot[None, :] & (slot[None, :] > place[:, None] - window)
        if BLOCK_TOKENS == 0:
            flat = (table_start + slot).to(tl.int64)
            seen = seen & (slot[None, :] <= place[:, None])
        else:
            block = tl.load(tables + table_start + slot // BLOCK_TOKENS, mask=is_slot, other=0)
            flat = block.to(tl.int64) * BLOCK_TOKENS + slot % BLOCK_TOKENS
        keys = _rows(key, flat * key_stride + kv_head * HEAD_SIZE, is_slot, HEAD_SIZE, HEAD_PADDED)
        values = _rows(value, flat * value_stride + kv_head * HEAD_SIZE, is_slot, HEAD_SIZE, HEAD_PADDED)
        scores = product(queries, tl.trans(keys), WIDEN) * scale
        out, total, peak = _absorb(out, total, peak, scores, seen, values, PRECISE, WIDEN)
    partial = (tl.load(item + 7) + kv_head * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    _store(partial_out, partial_lse, partial, out, total, peak, HEAD_SIZE, HEAD_PADDED)


@triton.jit
def _rows(part, places, exists, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """[n, HEAD_PADDED]: what lies at `places` [n] of `part`; 0 where nothing `exists` [n], and as padding."""
    size = tl.arange(0, HEAD_PADDED)
    return tl.load(
        part + places[:, None] + size[None, :], mask=exists[:, None] & (size < HEAD_SIZE)[None, :], other=0.0
    )


@triton.jit
def _absorb(
    out,
    total,
    peak,
    scores,
    seen,
    values,
    PRECISE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Some more slots: out [rows, size], total [rows] and peak [rows] after scores and seen [rows, slots]."""
    scores = tl.where(seen, scores, float("-inf"))
    peak_now = tl.maximum(peak, tl.max(scores, 1))
    # -inf minus -inf is NaN: a row that has seen nothing yet subtracts 0.
    shift = tl.where(peak_now == float("-inf"), 0.0, peak_now)
    weights = tl.where(seen, exponential(scores - shift[:, None], PRECISE), 0.0)
    decay = exponential(peak - shift, PRECISE)
    out = out * decay[:, None] + product(weights.to(values.dtype), values, WIDEN)
    return out, total * decay + tl.sum(weights, 1), peak_now


@triton.jit
def _store(
    partial_out,
    partial_lse,
    partial,
    out,
    total,
    peak,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
) -> None:
    """Write partial rows `partial` [rows]; a row that saw nothing has total 0: out 0 and lse -inf."""
    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(partial_lse + partial, tl.where(total > 0.0, peak + tl.log(divisor), float("-inf")))
    size = tl.arange(0, HEAD_PADDED)
    places = partial[:, None] * HEAD_SIZE + size[None, :]
    tl.store(
        partial_out + places,
        out / divisor[:, None],
        mask=(size < HEAD_SIZE)[None, :] & (partial >= 0)[:, None],
    )
