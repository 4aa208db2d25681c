"""Blocks: handed out once, all given back, in runs where there are runs. Slots: where a row lands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.errors import ResourceExhausted
from tests.attention_builders import build_geometry
from workers.attention.arena import Arena, BlockAllocator

BLOCKS = 24


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of allocations, growths and returns, beside a set that says what is free."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(BLOCKS)
        self.free = set(range(BLOCKS))
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, BLOCKS + 1), grown=st.integers(0, 20))
    def allocate(self, count: int, grown: int) -> None:
        """Free blocks, first those that follow, then the lowest run that fits, then the lowest."""
        after = self.held[grown][-1] if grown < len(self.held) else None
        if count > len(self.free):
            with pytest.raises(ResourceExhausted):
                self.allocator.allocate(count, after)
            return
        blocks = self.allocator.allocate(count, after)
        assert blocks == self.expected(count, after)
        self.free -= set(blocks)
        if blocks:
            self.held.append(blocks)

    @rule(index=st.integers(0, 20))
    def give_back(self, index: int) -> None:
        """What one holder had is free again."""
        if index < len(self.held):
            blocks = self.held.pop(index)
            self.allocator.give_back(blocks)
            self.free |= set(blocks)

    def expected(self, count: int, after: int | None) -> list[int]:
        """The rule of the allocator's docstring, said slowly."""
        chosen: list[int] = []
        while after is not None and len(chosen) < count and after + 1 in self.free:
            after += 1
            chosen.append(after)
        left, missing = self.free - set(chosen), count - len(chosen)
        for first in range(BLOCKS - missing + 1):
            run = range(first, first + missing)
            if left.issuperset(run):
                return chosen + list(run)
        return chosen + sorted(left)[:missing]

    @invariant()
    def nothing_is_lost_or_held_twice(self) -> None:
        """Free and held are all blocks, each once, and the allocator says the same."""
        held = [block for blocks in self.held for block in blocks]
        assert len(held) == len(set(held))
        assert set(held) | self.free == set(range(BLOCKS))
        assert len(held) + self.allocator.free == BLOCKS
        assert self.allocator.are_all_used(held)
        assert not held or not self.allocator.are_all_used(held[1:])
        assert not held or not self.allocator.are_all_used([*held[1:], held[1 % len(held)], held[0]])


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_growing_shard_stays_one_run_beside_another() -> None:
    """With room behind it a shard grows in place, whatever lower blocks are free."""
    allocator = BlockAllocator(12)
    low, shard = allocator.allocate(4), allocator.allocate(2)
    allocator.give_back(low)
    assert allocator.allocate(3, after=shard[-1]) == [6, 7, 8]
    assert allocator.allocate(3) == [0, 1, 2]


def test_what_follows_is_taken_even_when_it_is_not_enough() -> None:
    """A partly free neighbour is used first, the rest comes from the lowest run that is long enough."""
    allocator = BlockAllocator(10)
    first, wall = allocator.allocate(2), allocator.allocate(2)
    mine, behind = allocator.allocate(1), allocator.allocate(3)
    allocator.give_back(first)
    allocator.give_back(behind[:1])
    assert (mine, wall) == ([4], [2, 3])
    assert allocator.allocate(3, after=mine[-1]) == [5, 0, 1]


@pytest.mark.parametrize("blocks", [[0, 0], [5]], ids=["named twice", "never handed out"])
def test_freeing_what_is_free_is_a_bug(blocks: list[int]) -> None:
    """A block that is freed twice is refused before anything changes."""
    allocator = BlockAllocator(8)
    held = allocator.allocate(3)
    with pytest.raises(AssertionError, match="freed"):
        allocator.give_back(blocks)
    assert allocator.are_all_used(held)


def test_a_shortage_changes_nothing() -> None:
    """An allocation that cannot be served leaves every block where it was."""
    allocator = BlockAllocator(4)
    held = allocator.allocate(3)
    with pytest.raises(ResourceExhausted, match="2 blocks asked for, 1 of 4 free"):
        allocator.allocate(2, after=held[-1])
    assert allocator.are_all_used(held)
    assert allocator.allocate(1) == [3]


@settings(max_examples=30, deadline=None)
@given(slots=st.lists(st.integers(0, 5 * 7 - 1), min_size=1, max_size=12, unique=True))
def test_a_row_lands_in_its_slot_and_nowhere_else(slots: list[int]) -> None:
    """Slot s of a layer is block s // block_tokens, offset s % block_tokens; no other number moves."""
    arena = Arena(build_geometry(block_tokens=7), 5, torch.device("cpu"))
    for layer in range(2):
        arena.layer(layer).key.zero_()
        arena.layer(layer).value.zero_()
    key = torch.randn(len(slots), 2, 8)
    arena.append(1, torch.tensor(slots), key, -key)
    for index, slot in enumerate(slots):
        assert torch.equal(arena.layer(1).key[slot // 7, slot % 7], key[index])
        assert torch.equal(arena.layer(1).value[slot // 7, slot % 7], -key[index])
    assert int((arena.layer(1).key != 0).any((2, 3)).sum()) == len(slots)
    assert not arena.layer(0).key.any()
    assert not arena.layer(0).value.any()


def test_adjacent_blocks_are_one_slab() -> None:
    """A run of block ids of one layer is contiguous memory: a kernel reads it as one range of tokens."""
    arena = Arena(build_geometry(block_tokens=7), 5, torch.device("cpu"))
    cache = arena.layer(1)
    assert cache.key.is_contiguous()
    assert cache.key.flatten(0, 1).data_ptr() == cache.key.data_ptr()
    assert cache.key[2].data_ptr() - cache.key[1].data_ptr() == 7 * 2 * 8 * 4
