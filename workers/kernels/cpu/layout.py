"""The packed layout: a block with all its layers in one piece, tokens interleaved in groups of sixteen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.cpu import _native
from workers.kernels.memory import give_back, reserve
from workers.kernels.signature import CacheShape, LayerCache

TYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}
"""What the extension calls the types it knows."""


@dataclass(frozen=True, slots=True)
class PackedCache(LayerCache):
    """One layer of a packed arena. key, value: uint8 [blocks, kv_heads, bytes], as cache.h draws them."""

    native: _native.Layer
    dtype: torch.dtype
    blocks: int
    block_tokens: int
    kv_heads: int
    head_size: int


class PackedLayout:
    """[blocks, layers, kv_heads, record]: a record holds a block's keys and values of one head and layer.

    Block tokens that are no multiple of 16 and head sizes that are none are padded in memory. int8 is
    symmetric with a float32 scale for each token and head: a number errs by at most 1/254 of its row's
    largest.
    """

    name = "packed"

    def allocate(self, shape: CacheShape, device: torch.device) -> tuple[LayerCache, ...]:
        """See `signature.CacheLayout.allocate`. Raises ValueError off the CPU or for other types."""
        if device.type != "cpu" or shape.dtype not in TYPES:
            raise ValueError(f"no packed cache of {shape.dtype} on {device}; there are 4 types, on cpu")
        kind = TYPES[shape.dtype]
        record_bytes = _native.record_bytes(kind, shape.block_tokens, shape.head_size)
        sizes = (shape.blocks, shape.layers, shape.kv_heads, record_bytes)
        storage = reserve(torch.Size(sizes).numel(), device).view(sizes)
        key, value = storage.chunk(2, dim=-1)
        return tuple(
            PackedCache(
                key[:, layer],
                value[:, layer],
                _native.Layer(storage, layer, kind, shape.block_tokens, shape.head_size),
                shape.dtype,
                shape.blocks,
                shape.block_tokens,
                shape.kv_heads,
                shape.head_size,
            )
            for layer in range(shape.layers)
        )

    def append(self, cache: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """See `signature.CacheLayout.append`. Raises ValueError for slots outside the arena and for rows that
        do not fit it.
        """
        packed = packed_cache(cache)
        if slots.ndim != 1 or slots.dtype is not torch.int64 or not slots.is_cpu:
            raise ValueError(f"slots {list(slots.shape)} of {slots.dtype} on {slots.device}")
        places, count = slots.contiguous(), len(slots)
        key, key_stride_bytes = _appended(packed, key, count)
        value, value_stride_bytes = _appended(packed, value, count)
        _native.append(
            *(packed.native, places.data_ptr(), count),
            *(key.data_ptr(), key_stride_bytes, value.data_ptr(), value_stride_bytes),
            torch.get_num_threads(),
        )

    def read(self, cache: LayerCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `signature.CacheLayout.read`. Raises ValueError for slots outside the arena."""
        packed = packed_cache(cache)
        shape = (len(slots), packed.kv_heads, packed.head_size)
        key, value = (torch.empty(shape, dtype=_row_dtype(packed)) for _ in range(2))
        _native.read(packed.native, slots, key, value)
        return key, value

    def vacate(self, layers: Sequence[LayerCache], first: int, count: int) -> int:
        """See `signature.CacheLayout.vacate`. A block is one piece that begins with its first layer."""
        keys = packed_cache(layers[0]).key
        block_bytes = keys.stride(0)
        return give_back(keys.data_ptr() + first * block_bytes, count * block_bytes)


def packed_cache(cache: LayerCache) -> PackedCache:
    """`cache` itself. Raises ValueError when another layout made it."""
    if not isinstance(cache, PackedCache):
        raise ValueError(f"the cpu kernel reads packed caches, not keys of {tuple(cache.key.shape)}")
    return cache


def _appended(cache: PackedCache, rows: Tensor, count: int) -> tuple[Tensor, int]:
    """Rows that C++ may read at their address, themselves where they are, and bytes from row to row."""
    if rows.shape != (count, cache.kv_heads, cache.head_size):
        fitting = f"{count} slots of {cache.kv_heads} heads of {cache.head_size}"
        raise ValueError(f"rows {list(rows.shape)} for {fitting}")
    rows = rows.to("cpu", _row_dtype(cache))
    stride, head_stride, number_stride = rows.stride()
    if number_stride != 1 or head_stride != cache.head_size:
        rows, stride = rows.contiguous(), cache.kv_heads * cache.head_size
    return rows, stride * rows.itemsize


def _row_dtype(cache: PackedCache) -> torch.dtype:
    return torch.float32 if cache.dtype == torch.int8 else cache.dtype
