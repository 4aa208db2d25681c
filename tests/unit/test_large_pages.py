"""Large pages under weights: asked for where they can be, and never at a cost to what lies there."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from workers.dense.large_pages import PAGE_BYTES, lay_on_large_pages

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_memory_in_use_is_laid_on_large_pages_and_keeps_its_bytes() -> None:
    """Ranges that share a page count once; every byte is what it was. Needs a system with such pages."""
    if not _SETTING.exists() or "[never]" in _SETTING.read_text():
        pytest.skip("this system gives no large pages")
    mapping = mmap.mmap(-1, 4 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    memory[:] = torch.arange(256, dtype=torch.uint8).repeat(len(memory) // 256)
    before = memory.clone()
    first = -(-memory.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    # 0 before Linux 6.1, which does it later.
    assert lay_on_large_pages([(first, 5), (first + 5, 10), (first + PAGE_BYTES, 1)]) in (0, 2 * PAGE_BYTES)
    assert torch.equal(memory, before)


def test_what_is_no_memory_is_left_alone() -> None:
    """An address nobody has is refused by the system, and nothing follows from it."""
    assert lay_on_large_pages([(PAGE_BYTES, 1)]) == 0
    assert lay_on_large_pages([]) == 0
