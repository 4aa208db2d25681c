"""Room for a cache: address space now, pages when they are first written."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20


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
