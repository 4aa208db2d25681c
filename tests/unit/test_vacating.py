"""Memory of blocks that nobody uses goes back to the system."""

from __future__ import annotations

import pytest
import torch

from cluster.config import AttentionConfig, TierConfig
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, WorkerId
from workers.attention.arena import Arena, BlockAllocator
from workers.attention.core import AttentionCore
from workers.kernels.select import compiled_kernel
from workers.kernels.signature import CacheLayout
from workers.kernels.token_major import TOKEN_MAJOR
from workers.role import read_memory

BLOCKS = 512
GEOMETRY = KvGeometry(4, 4, 2, 64, "float32", 64, "any")
"""Blocks of 256 KiB: an arena of 128 MiB, of which large pages are a small part."""
ARENA_BYTES = BLOCKS * GEOMETRY.block_bytes
KEY = SequenceKey("request")


def layouts() -> list[CacheLayout]:
    """The plain one, and the compiled kernel's where it is built."""
    compiled = compiled_kernel()
    return [TOKEN_MAJOR] if compiled is None else [TOKEN_MAJOR, compiled.layout]


def written(arena: Arena) -> torch.Tensor:
    """Every slot of an arena, with what was written there."""
    slots = torch.arange(BLOCKS * GEOMETRY.block_tokens)
    rows = torch.rand(2, GEOMETRY.layers, len(slots), GEOMETRY.kv_heads, GEOMETRY.head_size)
    arena.write(slots, rows)
    return rows


@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: layout.name)
def test_resident_memory_falls_and_what_is_used_stays(layout: CacheLayout) -> None:
    """Three quarters of an arena go back: resident memory falls by as much, the rest is as it was, and what
    is written again is read again.
    """
    arena = Arena(GEOMETRY, BLOCKS, torch.device("cpu"), layout)
    rows = written(arena)
    before = read_memory().resident_bytes
    kept = BLOCKS // 4
    returned = arena.vacate(kept, BLOCKS - kept)
    assert returned >= 0.8 * 3 * ARENA_BYTES / 4
    assert before - read_memory().resident_bytes >= 0.9 * returned
    slots = torch.arange(kept * GEOMETRY.block_tokens)
    assert torch.equal(arena.read(slots), rows[:, :, : len(slots)])
    everything = torch.arange(rows.shape[2])
    gone = (arena.read(everything)[:, :, len(slots) :] == 0).double().mean()
    assert gone >= 0.8, "what went reads as zeros"
    arena.write(everything, rows)
    assert torch.equal(arena.read(everything), rows)


def test_what_was_never_used_or_is_used_again_is_not_vacant() -> None:
    """Vacant is what was handed out once and stayed free from one look to the next; it is named once."""
    allocator = BlockAllocator(8)
    blocks = allocator.allocate(6)
    allocator.give_back([0, 1, 3, 5])
    assert allocator.vacant(8) == []
    allocator.note_free()
    assert allocator.allocate(1) == [0]
    assert allocator.vacant(2) == [(1, 1), (3, 1)]
    assert allocator.vacant(8) == [(5, 1)]
    assert allocator.vacant(8) == []
    allocator.give_back([0, 2, 4])
    assert blocks == list(range(6))
    allocator.note_free()
    assert allocator.vacant(8) == [(0, 1), (2, 1), (4, 1)]


def test_a_worker_returns_what_stayed_free() -> None:
    """An ended sequence's blocks go back at the second look, as resident memory shows; those of a living one
    stay.
    """
    config = AttentionConfig(block_tokens=GEOMETRY.block_tokens, give_back_s=0)
    tier = TierConfig(arena=ARENA_BYTES)
    with AttentionCore(config, tier, GEOMETRY, WorkerId("attention-0"), Epoch(1)) as core:
        core.store.reserve(SequenceKey("stays"), Generation(1), 0, BLOCKS // 4 * GEOMETRY.block_tokens)
        core.store.reserve(KEY, Generation(1), 0, BLOCKS // 2 * GEOMETRY.block_tokens)
        written(core.arena)
        core.store.release(KEY, Generation(1))
        before = read_memory().resident_bytes
        assert core.give_back() == 0
        returned = core.give_back()
        assert returned >= 0.8 * BLOCKS // 2 * GEOMETRY.block_bytes
        assert before - read_memory().resident_bytes >= 0.9 * returned
        assert core.give_back() == 0
