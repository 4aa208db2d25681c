"""Prefixes that lie in the pool already: their identities, and where this dense worker saw them last.

Used by the engine's thread; `BlockChain` is also read by the pool's threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster import blocks
from cluster.blocks import BlockHash
from cluster.types import Epoch, KvGeometry, ShardRef, WorkerId
from workers.peer import ShardPrefix

_ENTRIES_MOST = 131_072
"""Blocks remembered: four million tokens in blocks of 32."""


class BlockChain:
    """The identities of one sequence's full blocks. Only grows, since a sequence's tokens only do."""

    def __init__(self, geometry: KvGeometry, tenant: str) -> None:
        self.block_tokens = geometry.block_tokens
        self.hashes: list[BlockHash] = []
        self._tenant = tenant
        self._root = blocks.root(geometry, tenant)

    def grow(self, token_ids: Sequence[int]) -> None:
        """Identities of the full blocks of `token_ids`, the sequence's from position 0 on."""
        known = len(self.hashes) * self.block_tokens
        parent = self.hashes[-1] if self.hashes else self._root
        self.hashes += blocks.chain(parent, token_ids[known:], self.block_tokens)

    def begin_as(self, other: BlockChain, tokens: int) -> None:
        """The first `tokens` are those of another chain of the same tenant: its identities are known here."""
        if not self.hashes and other._root == self._root:
            self.hashes = other.hashes[: tokens // self.block_tokens]

    def prefix(self, first: int) -> ShardPrefix:
        """What a worker needs to publish a shard that begins at `first`."""
        index, offset = divmod(first, self.block_tokens)
        is_known = offset == 0 and 0 < index <= len(self.hashes)
        return ShardPrefix(self._tenant, self.hashes[index - 1] if is_known else None)


@dataclass(frozen=True, slots=True)
class Source:
    """A life of a worker that may hold the blocks of positions first..end of a sequence."""

    worker: WorkerId
    epoch: Epoch
    first: int
    end: int


def sources_of(shards: Iterable[ShardRef]) -> tuple[Source, ...]:
    """The shards of a sequence with the same prefix, as sources."""
    return tuple(Source(shard.worker, shard.epoch, shard.first, shard.end) for shard in shards)


class PrefixIndex:
    """Identity -> the life of a worker that held the block. A hint: the worker's own answer counts.

    Bounded; what was neither seen nor asked for longest is forgotten first.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[BlockHash, tuple[WorkerId, Epoch]] = OrderedDict()

    def remember(self, chain: BlockChain, shards: Iterable[ShardRef]) -> None:
        """A sequence's KV lies in these shards; blocks cut by a shard's edge are nobody's."""
        size = chain.block_tokens
        for shard in shards:
            whole = range(-(-shard.first // size), min(shard.end // size, len(chain.hashes)))
            for index in whole:
                self._holders[chain.hashes[index]] = (shard.worker, shard.epoch)
                self._holders.move_to_end(chain.hashes[index])
        while len(self._holders) > _ENTRIES_MOST:
            self._holders.popitem(last=False)

    def sources(self, chain: BlockChain, leads_to: Callable[[WorkerId, Epoch], bool]) -> tuple[Source, ...]:
        """Where the longest known run of a sequence's blocks lies, from position 0 on; the last source is
        also asked for the open block behind. Forgets lives that no lane leads to.
        """
        size = chain.block_tokens
        found: list[Source] = []
        for index, identity in enumerate(chain.hashes):
            holder = self._holders.get(identity)
            if holder is None:
                break
            if not leads_to(*holder):
                del self._holders[identity]
                break
            self._holders.move_to_end(identity)
            first = index * size
            if found and (found[-1].worker, found[-1].epoch) == holder:
                first = found.pop().first
            found.append(Source(*holder, first, (index + 1) * size))
        if found:
            last = found.pop()
            found.append(Source(last.worker, last.epoch, last.first, last.end + size - 1))
        return tuple(found)
