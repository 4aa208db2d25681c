"""The plain layout: tokens one after the other, as they come; what the reference and PyTorch read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.kernels.memory import give_back, reserve
from workers.kernels.signature import CacheShape, LayerCache


class TokenMajorLayout:
    """Keys, then values, each [layers, blocks, block_tokens, kv_heads, head_size]."""

    name = "token-major"

    def allocate(self, shape: CacheShape, device: torch.device) -> tuple[LayerCache, ...]:
        """See `signature.CacheLayout.allocate`. Raises ValueError for int8, which needs scales."""
        if not shape.dtype.is_floating_point:
            raise ValueError(f"a {self.name} cache holds no {shape.dtype}")
        sizes = (shape.layers, shape.blocks, shape.block_tokens, shape.kv_heads, shape.head_size)
        byte_count = torch.Size(sizes).numel() * shape.dtype.itemsize
        key, value = (reserve(byte_count, device).view(shape.dtype).view(sizes) for _ in range(2))
        return tuple(LayerCache(*parts) for parts in zip(key, value, strict=True))

    def append(self, cache: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """See `signature.CacheLayout.append`."""
        for kept, rows in ((cache.key, key), (cache.value, value)):
            # From where a lane's bytes arrived to where the cache lies.
            kept.flatten(0, 1).index_copy_(0, slots, rows.to(kept))

    def read(self, cache: LayerCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `signature.CacheLayout.read`."""
        return cache.key.flatten(0, 1)[slots], cache.value.flatten(0, 1)[slots]

    def vacate(self, layers: Sequence[LayerCache], first: int, count: int) -> int:
        """See `signature.CacheLayout.vacate`."""
        parts = [part[first : first + count] for cache in layers for part in (cache.key, cache.value)]
        return sum(give_back(part.data_ptr(), part.nbytes) for part in parts if part.is_cpu)


TOKEN_MAJOR = TokenMajorLayout()
