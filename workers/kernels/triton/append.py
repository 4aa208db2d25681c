"""Writing a step's keys and values into their slots, both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.signature import LayerCache

_ELEMENTS = 1024


def append(cache: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Write row i of key and value [rows, kv_heads, head_size] into slot slots[i] of one layer's cache.

    slots: int64 [rows], block x block_tokens + offset, each once; a number outside the cache is not written.
    Rows of any float dtype; one element after the other within a row. Raises ValueError on other shapes.
    """
    row_shape = cache.key.shape[2:]
    for part in (key, value):
        if part.shape != (len(slots), *row_shape):
            raise ValueError(f"{tuple(part.shape)} for {len(slots)} slots of {tuple(row_shape)}")
    if len(slots) == 0:
        return
    elements = row_shape.numel()
    key, value = key.reshape(len(slots), elements), value.reshape(len(slots), elements)
    _append_row[(len(slots), -(-elements // _ELEMENTS))](
        cache.key,
        cache.value,
        slots,
        key,
        value,
        key.stride(0),
        value.stride(0),
        cache.key.shape[0] * cache.key.shape[1],
        ROW_ELEMENTS=elements,
        ELEMENTS=_ELEMENTS,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["slots_end"])
def _append_row(
    cache_key,
    cache_value,
    slots,
    key,
    value,
    key_stride,
    value_stride,
    slots_end,
    ROW_ELEMENTS: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    """Grid: (rows, stretches of ELEMENTS of a row)."""
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    slot = tl.load(slots + row)
    is_row = element < ROW_ELEMENTS
    keys = tl.load(key + row * key_stride + element, mask=is_row)
    values = tl.load(value + row * value_stride + element, mask=is_row)
    place = slot * ROW_ELEMENTS + element
    is_there = is_row & (place >= 0) & (place < slots_end.to(tl.int64) * ROW_ELEMENTS)
    tl.store(cache_key + place, keys.to(cache_key.dtype.element_ty), mask=is_there)
    tl.store(cache_value + place, values.to(cache_value.dtype.element_ty), mask=is_there)
