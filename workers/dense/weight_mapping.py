"""One safetensors file in memory: views into it, and pages given back once copied."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import BrokenModelFolder
from cluster.weight_files import StoredTensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored number types that can be served; others are refused by name."""


class WeightMapping:
    """Owns the mapping of one file; it lives as long as any view into it.

    The mapping is private (copy on write) because PyTorch has no read-only tensors; nothing writes to
    it, so every page stays the page cache's own.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def view(self, stored: StoredTensor) -> Tensor:
        """The tensor as stored, without a copy unless it lies unaligned."""
        dtype = DTYPES.get(stored.dtype)
        if dtype is None:
            raise BrokenModelFolder(
                f"{self._path}: tensor {stored.name} is {stored.dtype}; convert it to "
                f"one of {', '.join(DTYPES)}"
            )
        if stored.start % dtype.itemsize:
            data = bytearray(self._mapping[stored.start : stored.end])
            return torch.frombuffer(data, dtype=dtype).view(stored.shape)
        elements = (stored.end - stored.start) // dtype.itemsize
        view = torch.frombuffer(self._mapping, dtype=dtype, count=elements, offset=stored.start)
        return view.view(stored.shape)

    def read_in(self, stored: StoredTensor) -> None:
        """Touch every page, so that no later step waits for the disk."""
        data = torch.frombuffer(
            self._mapping, dtype=torch.uint8, count=stored.end - stored.start, offset=stored.start
        )
        data[:: mmap.PAGESIZE].sum()

    def give_back(self, stored: StoredTensor) -> None:
        """Drop the whole pages of a tensor that was copied; its view must not be used again."""
        first = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = stored.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            self._mapping.madvise(mmap.MADV_DONTNEED, first, end - first)
