"""Stage two: the partials of all splits of a row become its result (DistAttention's merge)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.arithmetic import exponential
from workers.kernels.triton.tables import ROW_FIELDS, SpanTables
from workers.kernels.triton.tiling import padded

_ROW_FIELDS = tl.constexpr(ROW_FIELDS)
_PARTS = 16
"""Partials a program reads at once."""


def merge(
    partials: tuple[Tensor, Tensor], tables: SpanTables, kv_heads: int, out: Tensor, lse: Tensor
) -> None:
    """Launch stage two: from the partials of stage one to out [rows, query_heads, head_size] and lse [rows,
    query_heads], all float32.

    partials: out [partial rows, head_size] and lse [partial rows]. Every row is written; one of no span gets
    0 and -inf.
    """
    rows, query_heads, head_size = out.shape
    _merge_row[(rows, query_heads)](
        *partials,
        tables.rows,
        out,
        lse,
        kv_heads,
        GROUP=query_heads // kv_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=padded(head_size),
        PARTS=_PARTS,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["kv_heads"])
def _merge_row(
    partial_out,
    partial_lse,
    rows,
    out,
    lse,
    kv_heads,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Grid: (rows, query heads). Reads the row's partials in the order of the slots, PARTS at once."""
    row = rows + tl.program_id(0) * _ROW_FIELDS
    head = tl.program_id(1)
    splits = tl.load(row + 2)
    tile_rows = tl.load(row + 3)
    packed = tl.load(row + 1) * GROUP + head % GROUP
    first = (tl.load(row) + packed // tile_rows * splits * kv_heads * tile_rows).to(tl.int64)
    first += head // GROUP * tile_rows + packed % tile_rows
    size = tl.arange(0, HEAD_PADDED)
    peak = -float("inf")
    total = 0.0
    merged = tl.zeros([HEAD_PADDED], tl.float32)
    for split in range(0, splits, PARTS):
        part = split + tl.arange(0, PARTS)
        place = first + part * kv_heads * tile_rows
        part_lse = tl.load(partial_lse + place, mask=part < splits, other=float("-inf"))
        seen = part_lse > float("-inf")
        parts = tl.load(
            partial_out + place[:, None] * HEAD_SIZE + size[None, :],
            mask=seen[:, None] & (size < HEAD_SIZE)[None, :],
            other=0.0,
        )
        peak_now = tl.maximum(peak, tl.max(part_lse, 0))
        # -inf minus -inf is NaN: where nothing was seen yet, 0 is subtracted.
        shift = tl.where(peak_now == float("-inf"), 0.0, peak_now)
        weights = tl.where(seen, exponential(part_lse - shift, PRECISE=True), 0.0)
        decay = exponential(peak - shift, PRECISE=True)
        merged = merged * decay + tl.sum(parts * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        peak = peak_now
    divisor = tl.where(total > 0.0, total, 1.0)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    tl.store(lse + place, tl.where(total > 0.0, peak + tl.log(divisor), float("-inf")))
    tl.store(out + place * HEAD_SIZE + size, merged / divisor, mask=size < HEAD_SIZE)
