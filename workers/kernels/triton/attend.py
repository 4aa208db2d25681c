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
        _attend_tiles[(items.shape[0] * kv_heads,)](
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
            KV_HEADS=kv_heads,
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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Grid: items x KV heads, the heads faster: what lies side by side is read at about the same time. Writes
    ROWS partial rows from where the item says.

    Packed row p of a span is its row p // GROUP under the p % GROUP-th query head of the KV head.
    BLOCK_TOKENS 0: the slots are a chunk's own rows, each seen up to itself; else `tables` names the blocks.
    """
    item = items + tl.program_id(0) // KV_HEADS * _ITEM_FIELDS
    kv_head = tl.program_id(0) % KV_HEADS
    packed_first = tl.load(item + 2)
    packed = packed_first + tl.arange(0, ROWS)
    place_start = tl.load(item + 3)
    place = place_start + packed // GROUP  # the row's own place among the slots
    slot_start, slot_stop, before, whole = _extent(
        tl.load(item + 4),
        tl.load(item + 5),
        place_start + packed_first // GROUP,
        place_start + (packed_first + ROWS - 1) // GROUP,
        window,
        SLOTS,
        BLOCK_TOKENS == 0,
    )
    table_start = tl.load(item + 6)
    row = (tl.load(item) + packed // GROUP).to(tl.int64)
    head = kv_head * GROUP + packed % GROUP
    place_of_row = (row * KV_HEADS * GROUP + head) * HEAD_SIZE
    queries = _rows(query, place_of_row, packed < tl.load(item + 1), HEAD_SIZE, HEAD_PADDED, True)
    key += kv_head * HEAD_SIZE
    value += kv_head * HEAD_SIZE
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for tile in range(before, before + whole):
        slot = slot_start + tile * SLOTS + tl.arange(0, SLOTS)
        out, total, peak = _absorb(
            out, total, peak, queries, place, window, scale,
            key, value, key_stride, value_stride, tables, table_start, slot, slot_stop,
            HEAD_SIZE, HEAD_PADDED, BLOCK_TOKENS, PRECISE, WIDEN, CUT=False,
        )  # fmt: skip
    for number in range(tl.cdiv(slot_stop - slot_start, SLOTS) - whole):
        tile = number + tl.where(number < before, 0, whole)
        slot = slot_start + tile * SLOTS + tl.arange(0, SLOTS)
        out, total, peak = _absorb(
            out, total, peak, queries, place, window, scale,
            key, value, key_stride, value_stride, tables, table_start, slot, slot_stop,
            HEAD_SIZE, HEAD_PADDED, BLOCK_TOKENS, PRECISE, WIDEN, CUT=True,
        )  # fmt: skip
    partial = (tl.load(item + 7) + kv_head * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    _store(partial_out, partial_lse, partial, out, total, peak, HEAD_SIZE, HEAD_PADDED)


@triton.jit
def _extent(
    slot_start, slot_stop, place_first, place_last, window, SLOTS: tl.constexpr, CAUSAL: tl.constexpr
):
    """The slots a tile of rows reads, and where no mask is needed: `whole` tiles of SLOTS, seen by all rows,
    after `before` of them, where the last row's window begins. CAUSAL: a row sees slots up to its own place.
    """
    slot_start = tl.maximum(slot_start, place_first - window + 1)
    whole_stop = slot_stop
    if CAUSAL:
        slot_stop = tl.minimum(slot_stop, place_last + 1)
        whole_stop = tl.minimum(slot_stop, place_first + 1)
    before = tl.cdiv(tl.maximum(place_last - window + 1 - slot_start, 0), SLOTS)
    whole = tl.maximum((whole_stop - slot_start) // SLOTS - before, 0)
    return slot_start, slot_stop, before, whole


@triton.jit
def _absorb(
    out, total, peak, queries, place, window, scale,
    key, value, key_stride, value_stride, tables, table_start, slot, slot_stop,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISE: tl.constexpr,
    WIDEN: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Some more slots [slots]: out [rows, size], total [rows] and peak [rows] with them. CUT: not every row
    sees all of them.
    """
    exists = slot < slot_stop
    if BLOCK_TOKENS == 0:
        flat = (table_start + slot).to(tl.int64)
    else:
        number = tables + table_start + slot // BLOCK_TOKENS
        block = tl.load(number, mask=exists, other=0) if CUT else tl.load(number)
        flat = block.to(tl.int64) * BLOCK_TOKENS + slot % BLOCK_TOKENS
    keys = _rows(key, flat * key_stride, exists, HEAD_SIZE, HEAD_PADDED, CUT)
    values = _rows(value, flat * value_stride, exists, HEAD_SIZE, HEAD_PADDED, CUT)
    scores = product(queries, tl.trans(keys), WIDEN) * scale
    if CUT:
        seen = exists[None, :] & (slot[None, :] > place[:, None] - window)
        if BLOCK_TOKENS == 0:
            seen = seen & (slot[None, :] <= place[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    peak_now = tl.maximum(peak, tl.max(scores, 1))
    shift = peak_now
    if CUT:  # -inf minus -inf is NaN: a row that has seen nothing yet subtracts 0.
        shift = tl.where(peak_now == float("-inf"), 0.0, peak_now)
    weights = exponential(scores - shift[:, None], PRECISE)
    if CUT:
        weights = tl.where(seen, weights, 0.0)
    decay = exponential(peak - shift, PRECISE)
    out = out * decay[:, None] + product(weights.to(values.dtype), values, WIDEN)
    return out, total * decay + tl.sum(weights, 1), peak_now


@triton.jit
def _rows(part, places, exists, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, CUT: tl.constexpr):
    """[n, HEAD_PADDED]: what lies at `places` [n] of `part`; 0 as padding and, if CUT, where nothing
    `exists` [n].
    """
    size = tl.arange(0, HEAD_PADDED)
    rows = part + places[:, None] + size[None, :]
    if CUT:
        read = tl.load(rows, mask=exists[:, None] & (size < HEAD_SIZE)[None, :], other=0.0)
    elif HEAD_SIZE == HEAD_PADDED:
        read = tl.load(rows)
    else:
        read = tl.load(rows, mask=(size < HEAD_SIZE)[None, :], other=0.0)
    return read


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
