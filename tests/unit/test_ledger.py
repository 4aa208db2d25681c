"""Blocks with several referrers: counted, published once per identity, kept as a cache, evicted in order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.blocks import BlockHash
from cluster.errors import ResourceExhausted
from workers.attention.journal import Journal
from workers.attention.ledger import BlockLedger

BLOCKS = 8
INDEX = st.integers(0, 9)


def identity(number: int) -> BlockHash:
    """An identity."""
    return BlockHash(number.to_bytes(32, "little"))


class LedgerMachine(RuleBasedStateMachine):
    """Any order of calls, beside lists of who holds what and what was published."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal()
        self.ledger = BlockLedger(BLOCKS, self.journal)
        self.holders: list[list[int]] = []
        self.published: dict[int, int] = {}
        """Identity number -> block."""
        self.unused: list[int] = []
        """Published blocks nobody holds, longest unused first."""
        self.told: set[tuple[BlockHash, int]] = set()
        """What the journal's reports say is published."""

    @property
    def references(self) -> Counter[int]:
        """How often each block is held."""
        return Counter(block for blocks in self.holders for block in blocks)

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        """Blocks nobody holds; cached ones go only as far as free ones do not suffice."""
        free = BLOCKS - len(self.references) - len(self.unused)
        if count > free + len(self.unused):
            with pytest.raises(ResourceExhausted):
                self.ledger.allocate(count)
            return
        gone = self.unused[: max(0, count - free)]
        self.unused = self.unused[len(gone) :]
        self.published = {number: block for number, block in self.published.items() if block not in gone}
        blocks = self.ledger.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & (set(self.references) | set(self.unused))
        self.holders.append(blocks)

    @rule(holder=INDEX, number=st.integers(0, 5))
    def publish(self, holder: int, number: int) -> None:
        """A holder's first unpublished block is sealed; an older one of the same identity takes its place."""
        if holder >= len(self.holders):
            return
        blocks = self.holders[holder]
        private = [index for index, block in enumerate(blocks) if block not in self.published.values()]
        if not private:
            return
        index = private[0]
        kept = self.ledger.publish(blocks[index], identity(number), number + 1)
        assert kept == self.published.get(number, blocks[index])
        if kept in self.unused:
            self.unused.remove(kept)
        self.published[number] = blocks[index] = kept

    @rule(numbers=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    def pin(self, numbers: list[int]) -> None:
        """The longest run that is published, in order, whether somebody holds it or not."""
        run: list[int] = []
        for number in numbers:
            if number not in self.published:
                break
            run.append(self.published[number])
        assert self.ledger.pin(map(identity, numbers)) == run
        self.unused = [block for block in self.unused if block not in run]
        if run:
            self.holders.append(run)

    @rule(holder=INDEX)
    def withdraw(self, holder: int) -> None:
        """A block with one holder may become private again; one with more may not."""
        if holder >= len(self.holders):
            return
        for block in self.holders[holder]:
            if block in self.published.values():
                alone = self.references[block] == 1
                assert self.ledger.withdraw(block) == alone
                if alone:
                    self.published = {n: other for n, other in self.published.items() if other != block}

    @rule(holder=INDEX)
    def drop(self, holder: int) -> None:
        """What nobody holds any more is free, or cached with a shard's end before its beginning."""
        if holder >= len(self.holders):
            return
        blocks = self.holders.pop(holder)
        gone = [block for block in dict.fromkeys(reversed(blocks)) if not self.references[block]]
        assert self.ledger.releasable(blocks) <= len(gone)
        assert self.ledger.drop(blocks) == len(gone)
        self.unused += [block for block in gone if block in self.published.values()]

    @rule(wants_all=st.booleans())
    def report(self, wants_all: bool) -> None:
        """A listener that takes every report knows exactly what is published."""
        report = self.journal.report()
        if report.starts_over:
            self.told.clear()
        for gone in report.withdrawn:
            self.told = {entry for entry in self.told if entry[0] != gone}
        self.told |= {(BlockHash(block.hash), block.prefix_blocks) for block in report.published}
        assert self.told == {(identity(number), number + 1) for number in self.published}
        self.journal.acknowledge(wants_all=wants_all)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        """Free, held and cached are all blocks."""
        assert self.ledger.cached == len(self.unused)
        assert self.ledger.free == BLOCKS - len(self.references) - len(self.unused)
        assert self.ledger.shared_surplus == self.references.total() - len(self.references)
        assert self.ledger.is_consistent(self.references.elements())
        assert not self.ledger.is_consistent([*self.references.elements(), 0])


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
