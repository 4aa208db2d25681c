"""Large pages under memory that is there already: weights that every step reads from end to end."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

PAGE_BYTES = 2 * 2**20
"""Of a large page on x86 and on most ARM systems."""

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
"""Since Linux 6.1; before, the first advice has the kernel do it by and by."""


def lay_on_large_pages(ranges: Iterable[tuple[int, int]]) -> int:
    """Ask for large pages under (address, bytes) of this process's own memory; how many bytes got them.

    Ranges widen to whole pages: small ones side by side in the heap share one. A walk over small pages
    misses the TLB at each, which on a virtual machine costs two walks of page tables. 0 where the system
    does not do it, or does it later; nothing depends on it but time.
    """
    if sys.platform != "linux":
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    pages = {
        page
        for start, size in ranges
        for page in range(start // PAGE_BYTES, -(-(start + size) // PAGE_BYTES))
    }
    laid = 0
    for page in sorted(pages):
        # A page that reaches into what is no heap is refused, and stays as it is.
        if advise(page * PAGE_BYTES, PAGE_BYTES, _MADV_HUGEPAGE) == 0:
            laid += advise(page * PAGE_BYTES, PAGE_BYTES, _MADV_COLLAPSE) == 0
    return laid * PAGE_BYTES
