"""Memory that is used again: between two matrix products to allocate costs more than a small operator."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_SHAPES_KEPT = 4
"""Of one use, and thread: micro-batches of two sizes, and those of the step before."""


class KeptMemory(threading.local):
    """Each thread's own, by shape; the shape that came first goes for one too many."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def of(self, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """Memory of a shape, with whatever is in it, and its address; until the thread's next call."""
        found = self._kept.get(shape)
        if found is None:
            if len(self._kept) == _SHAPES_KEPT:
                del self._kept[next(iter(self._kept))]
            memory = torch.empty(shape, dtype=self._dtype)
            found = self._kept[shape] = memory, memory.data_ptr()
        return found
