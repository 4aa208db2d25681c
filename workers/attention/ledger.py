"""The state of every block of an arena: who refers to it, and which identity it was published under."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from cluster.blocks import BlockHash
from cluster.errors import ResourceExhausted
from workers.attention.arena import BlockAllocator
from workers.attention.journal import Journal


class BlockLedger:
    """Hands out blocks, counts their referrers, and keeps published ones that nobody refers to as a cache.

                  allocate              publish                  last referrer dropped
        free ----------------> private ---------> referenced --------------------------> cached
          ^    dropped            |                   ^                                    | |
          +-----------------------+ <-- withdraw ---- +------------- pin ------------------+ |
          +--------------------------- evicted, longest unused first ------------------------+

    A private block has one referrer; a published one any number, none of whom may write to it.
    Invariant: free + allocated = capacity, and an allocated block has a referrer or is cached.
    """

    def __init__(self, blocks: int, journal: Journal) -> None:
        """`journal` is told what is published, and what no longer is."""
        self.evictions = 0
        """Cached blocks given up for others, ever."""
        self._journal = journal
        self.allocator = BlockAllocator(blocks)
        """Which blocks are free."""
        self._referrers: dict[int, int] = {}
        self._references = 0
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Longest unused first; the end of a chain before its beginning, without which it cannot be found."""

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return self.allocator.free

    @property
    def cached(self) -> int:
        """Published blocks nobody refers to."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that can be allocated."""
        return self.free + self.cached

    @property
    def shared_surplus(self) -> int:
        """References beyond each block's first: how many blocks sharing saves now."""
        return self._references - len(self._referrers)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` private blocks, right after block `after` if they are free (see `BlockAllocator`).
        Raises ResourceExhausted, changing nothing.
        """
        if count > self.available:
            raise ResourceExhausted(f"{count} blocks asked for, {self.available} can be had")
        self._evict(max(0, count - self.free))
        blocks = self.allocator.allocate(count, after)
        for block in blocks:
            self._refer(block)
        return blocks

    def drop(self, blocks: Sequence[int]) -> int:
        """One referrer of each of a shard's blocks, in the shard's order, is gone; returns how many blocks
        became available by it.
        """
        gone = []
        for block in reversed(blocks):
            self._referrers[block] -= 1
            self._references -= 1
            if self._referrers[block] == 0:
                del self._referrers[block]
                gone.append(block)
        private = [block for block in gone if block not in self._hash_of]
        self._cached.update((block, None) for block in gone if block in self._hash_of)
        self.allocator.give_back(private)
        return len(gone)

    def publish(self, block: int, identity: BlockHash, prefix_blocks: int) -> int:
        """A private block is sealed, the last one of a prefix of so many: from now on it may be shared.
        Returns the block to use instead of it: where its identity is published already, the older block is
        kept and this one freed.
        """
        assert self._referrers[block] == 1
        assert block not in self._hash_of
        older = self._block_of.get(identity)
        if older is not None:
            self._refer(older)
            self.drop([block])
            return older
        self._hash_of[block] = identity
        self._block_of[identity] = block
        self._journal.published(identity, prefix_blocks)
        return block

    def withdraw(self, block: int) -> bool:
        """Make a published block private again; False where others refer to it."""
        if self._referrers[block] > 1:
            return False
        self._hide(block)
        return True

    def pin(self, identities: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest run of `identities` from the first on, each with one referrer more."""
        blocks = []
        for identity in identities:
            block = self._block_of.get(identity)
            if block is None:
                break
            self._refer(block)
            blocks.append(block)
        return blocks

    def releasable(self, blocks: Iterable[int]) -> int:
        """How many of a shard's blocks nobody else refers to."""
        return sum(self._referrers[block] == 1 for block in blocks)

    def is_consistent(self, references: Iterable[int]) -> bool:
        """Whether `references`, the blocks of all shards, are exactly the referrers counted here."""
        counted = dict(Counter(references)) == self._referrers
        assert self._references == sum(self._referrers.values())
        inverse = {block: identity for identity, block in self._block_of.items()} == self._hash_of
        cached = (
            self._referrers.keys().isdisjoint(self._cached) and self._cached.keys() <= self._hash_of.keys()
        )
        return (
            counted and inverse and cached and self.allocator.are_all_used([*self._referrers, *self._cached])
        )

    def _refer(self, block: int) -> None:
        self._referrers[block] = self._referrers.get(block, 0) + 1
        self._references += 1
        self._cached.pop(block, None)

    def _evict(self, count: int) -> None:
        blocks = [self._cached.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._hide(block)
        self.allocator.give_back(blocks)
        self.evictions += count

    def _hide(self, block: int) -> None:
        identity = self._hash_of.pop(block)
        del self._block_of[identity]
        self._journal.withdrawn(identity)
