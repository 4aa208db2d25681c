"""An attention worker's memory: the bytes of all blocks, and which of them are in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ResourceExhausted
from cluster.types import KvGeometry
from workers.kernels.signature import CacheLayout, CacheShape, LayerCache
from workers.kernels.token_major import TOKEN_MAJOR

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Arena:
    """The KV of all blocks and layers, in the layout of the kernel that attends over it.

    Host pages are touched, and so paid for, only when a block is first written, and go back with `vacate`.
    """

    def __init__(
        self, geometry: KvGeometry, blocks: int, device: torch.device, layout: CacheLayout = TOKEN_MAJOR
    ) -> None:
        """Raises OSError or RuntimeError when there is not that much memory to be had."""
        assert blocks > 0, "an arena holds at least one block"
        self.geometry = geometry
        self.blocks = blocks
        self.device = device
        self.layout = layout
        shape = CacheShape(
            geometry.layers,
            blocks,
            geometry.block_tokens,
            geometry.kv_heads,
            geometry.head_size,
            _DTYPES[geometry.dtype],
        )
        self._layers = layout.allocate(shape, device)

    def layer(self, index: int) -> LayerCache:
        """What a kernel reads."""
        return self._layers[index]

    def append(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write rows into slots. slots: int64 [rows], block id x block_tokens + offset; key, value:
        [rows, kv_heads, head_size]. Never allocates.
        """
        self.layout.append(self._layers[layer], slots, key, value)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that `read` gives."""
        return _DTYPES[self.geometry.dtype]

    def read(self, slots: Tensor) -> Tensor:
        """A copy of slots in host memory, whatever the layout: [2, layers, rows, kv_heads, head_size].

        What was never written is undefined.
        """
        parts = [torch.stack(self.layout.read(cache, slots)) for cache in self._layers]
        return torch.stack(parts, 1).cpu()

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """What `read` gave, here or at a worker of another layout, into other slots."""
        for layer, (key, value) in enumerate(zip(*rows, strict=True)):
            self.append(layer, slots, key, value)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block's keys and values, all layers, where they lie."""
        offsets = torch.arange(self.geometry.block_tokens, device=self.device)
        here, there = (block * self.geometry.block_tokens + offsets for block in (source, target))
        for cache in self._layers:
            self.layout.append(cache, there, *self.layout.read(cache, here))

    def vacate(self, first: int, count: int) -> int:
        """Return the memory of free blocks first..first+count to the system; how many bytes went."""
        return self.layout.vacate(self._layers, first, count)


class BlockAllocator:
    """Hands out block ids, preferring runs: those right after a shard's last block, then the lowest run
    that is long enough, then whatever is free from below.

    Low ids first keeps the touched part of an arena small.
    """

    def __init__(self, blocks: int) -> None:
        self._is_free = np.ones(blocks, dtype=bool)
        self._has_memory = np.zeros(blocks, dtype=bool)
        self._was_free = np.zeros(blocks, dtype=bool)
        self.free = blocks

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` block ids, in the order a shard uses them. Raises ResourceExhausted, changing nothing."""
        assert count >= 0, count
        if count > self.free:
            raise ResourceExhausted(f"{count} blocks asked for, {self.free} of {len(self._is_free)} free")
        chosen = self._following(count, after) if after is not None else []
        chosen += self._runs(count - len(chosen), set(chosen))
        self._is_free[chosen] = self._was_free[chosen] = False
        self._has_memory[chosen] = True
        self.free -= count
        return chosen

    def give_back(self, blocks: Sequence[int]) -> None:
        """Free blocks that were handed out."""
        assert len(set(blocks)) == len(blocks), f"freed twice: {blocks}"
        assert not self._is_free[blocks].any(), f"freed, but never handed out: {blocks}"
        self._is_free[blocks] = True
        self.free += len(blocks)

    def note_free(self) -> None:
        """What is free now, and stays so, is `vacant` later."""
        self._was_free = self._is_free.copy()

    def vacant(self, most: int) -> list[tuple[int, int]]:
        """Runs (first block, count) of up to `most` blocks, handed out once and free since `note_free`. Each
        is named once: whoever asks returns its memory.
        """
        blocks = np.flatnonzero(self._has_memory & self._was_free)[:most]
        self._has_memory[blocks] = False
        runs = np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1)
        return [(int(run[0]), len(run)) for run in runs if len(run)]

    def are_all_used(self, blocks: Sequence[int]) -> bool:
        """Whether `blocks` are exactly those handed out, each named once."""
        used = np.flatnonzero(~self._is_free)
        counted = self.free == len(self._is_free) - len(used)
        return counted and np.array_equal(used, np.sort(np.asarray(blocks, dtype=np.int64)))

    def _following(self, count: int, after: int) -> list[int]:
        end = after + 1
        while end < len(self._is_free) and end - after <= count and self._is_free[end]:
            end += 1
        return list(range(after + 1, min(end, after + 1 + count)))

    def _runs(self, count: int, taken: set[int]) -> list[int]:
        if count == 0:
            return []
        free = self._is_free.copy()
        free[list(taken)] = False
        edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False])).astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        enough = np.flatnonzero(lengths >= count)
        if len(enough):
            first = int(starts[enough[0]])
            return list(range(first, first + count))
        return [int(block) for block in np.flatnonzero(free)[:count]]
