"""Room for a cache: address space now, pages when they are first written."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20
_MADV_DONTNEED = 4
_ALIGNMENT = 64


def reserve(byte_count: int, device: torch.device) -> Tensor:
    """uint8 [byte_count], zero on the host, undefined elsewhere.

    Host memory is mapped, not touched: pages come with the first write (vAttention's idea), large ones
    where the system has them, because a walk over a cache misses the TLB on every small page. Raises
    OSError or RuntimeError when there is not that much address space or device memory.
    """
    if device.type != "cpu":
        return torch.empty(byte_count, dtype=torch.uint8, device=device)
    mapping = mmap.mmap(-1, byte_count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if byte_count >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


class Slabs:
    """Host memory by the piece: side by side, so that small ones share large pages. A slab lives while any of
    its pieces does.
    """

    def __init__(self, slab_bytes: int = 64 * 2**20) -> None:
        self._slab_bytes = slab_bytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, byte_count: int) -> Tensor:
        """uint8 [byte_count], zero, at a multiple of 64 bytes. Raises OSError as `reserve`."""
        size = -(-byte_count // _ALIGNMENT) * _ALIGNMENT
        if size > len(self._left):
            self._left = reserve(max(size, self._slab_bytes), torch.device("cpu"))
        piece, self._left = self._left[:byte_count], self._left[size:]
        return piece


def give_back(address: int, byte_count: int) -> int:
    """Return the whole large pages of a range of `reserve`d host memory to the system; how many bytes went.

    They read as zeros, and come again with the next write. Smaller pieces stay: without them what is in use
    beside would be cut into small pages. 0 on systems that do it otherwise.
    """
    first = -(-address // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (address + byte_count) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if sys.platform != "linux" or end <= first:
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return end - first if advise(first, end - first, _MADV_DONTNEED) == 0 else 0
