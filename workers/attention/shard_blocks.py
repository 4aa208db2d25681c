"""How shards get, share and give up blocks. No leases, no generations: those are the store's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster import blocks
from cluster.blocks import BlockHash
from cluster.fault_points import reach
from cluster.types import KvGeometry, SequenceKey, ShardId
from workers.attention.journal import Journal
from workers.attention.ledger import BlockLedger
from workers.attention.shard import Shard
from workers.peer import ShardPrefix

CopyBlock = Callable[[int, int], None]
"""Copies the contents of one block to another, all layers."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What sequences share blocks by: how one is copied in part, and who notes which may be shared."""

    copy_block: CopyBlock
    journal: Journal


@dataclass(frozen=True, slots=True)
class BlockAccount:
    """free + reserved + open + sealed_referenced + sealed_cached = capacity."""

    capacity: int
    free: int
    reserved: int
    open: int
    sealed_referenced: int
    sealed_cached: int

    @property
    def available(self) -> int:
        """Blocks that can be reserved."""
        return self.free + self.sealed_cached

    @property
    def total(self) -> int:
        """The blocks of all states."""
        return self.available + self.reserved + self.open + self.sealed_referenced


@dataclass(frozen=True, slots=True)
class BlockChain:
    """Identities of consecutive full blocks, and of what lies before the first."""

    before: BlockHash
    hashes: list[BlockHash]


class ShardBlocks:
    """The shards of one arena and their blocks.

    Sealed blocks of a shard whose prefix is known are published under their identity (`cluster.blocks`).
    `acquire` lets another sequence refer to them where they lie; what nobody refers to stays as a cache
    until the room is needed. A block of which a sequence needs a part is copied, never shared.
    """

    def __init__(self, geometry: KvGeometry, capacity: int, sharing: Sharing | None) -> None:
        """`capacity` in blocks; without `sharing` nothing is shared."""
        self.ledger = BlockLedger(capacity, sharing.journal if sharing is not None else Journal())
        self._geometry = geometry
        self._capacity = capacity
        self._sharing = sharing
        self._shards: dict[ShardId, Shard] = {}
        self._shard_ids = itertools.count(1)

    def get(self, shard_id: ShardId) -> Shard | None:
        """The shard of this id."""
        return self._shards.get(shard_id)

    def reserve(self, key: SequenceKey, first: int, end: int) -> Shard:
        """A new shard of fresh blocks. Raises ResourceExhausted."""
        return self._add(key, first, end, self.ledger.allocate(self._geometry.blocks_for(end - first)))

    def extend(self, shard: Shard, end: int) -> None:
        """Room up to `end`. Raises ResourceExhausted."""
        wanted = self._geometry.blocks_for(end - shard.first) - len(shard.blocks)
        shard.blocks += self.ledger.allocate(wanted, after=shard.blocks[-1])
        shard.end = end

    def identify(self, first: int, token_ids: Sequence[int], prefix: ShardPrefix) -> BlockChain | None:
        """The identities of full blocks of these tokens; None where none are shared from `first` on. Reads
        nothing that changes: a long prompt is hashed before its turn.
        """
        before = self._before(first, prefix)
        if before is None:
            return None
        return BlockChain(before, blocks.chain(before, token_ids, self._geometry.block_tokens))

    def acquire(
        self, key: SequenceKey, first: int, token_ids: Sequence[int], chain: BlockChain
    ) -> Shard | None:
        """A shard at `first` of what lies here of its tokens, which `identify` named: the longest run of
        published blocks, and a copy of a living sequence's block behind them as far as that agrees. None when
        there is nothing, or only something to copy and no room for it.
        """
        before, hashes = chain.before, chain.hashes
        found = self.ledger.pin(hashes)
        pinned = len(found)
        tokens = pinned * self._geometry.block_tokens
        behind = hashes[pinned - 1] if found else before
        source, same = self._best_behind(behind, first + tokens, token_ids[tokens:])
        if same and self.ledger.available:
            assert self._sharing is not None
            found += self.ledger.allocate(1)
            self._sharing.copy_block(source, found[-1])
            tokens += same
        if not found:
            return None
        shard = self._add(key, first, first + tokens, found)
        shard.token_ids = list(token_ids[:tokens])
        shard.parent, shard.hashes = before, hashes[:pinned]
        self.publish(shard)
        return shard

    def commit(self, shard: Shard, start: int) -> None:
        """See `Shard.commit`; full blocks of what is certain then are published."""
        shard.commit(start)
        self.publish(shard)

    def learn_parent(self, shard: Shard, prefix: ShardPrefix) -> None:
        """What lies before the shard has an identity: with its next commit its sealed blocks get one too. Not
        now, for a step may be reading blocks that would give way to older ones.
        """
        if shard.parent is None:
            shard.parent = self._before(shard.first, prefix)

    def publish(self, shard: Shard) -> None:
        """Publish what became sealed. Where a block's identity was published before, the older block is
        kept; no kernel reads the other, because its sequence is between two steps.
        """
        while len(shard.hashes) < shard.sealed:
            index = len(shard.hashes)
            before = shard.hash_before(index)
            if before is None:
                return
            identity = blocks.child(before, shard.block_token_ids(index))
            reach("seal-publish")
            prefix_blocks = shard.first // shard.block_tokens + index + 1
            shard.blocks[index] = self.ledger.publish(shard.blocks[index], identity, prefix_blocks)
            shard.hashes.append(identity)

    def truncate(self, shard: Shard, token_ids: Sequence[int]) -> int | None:
        """See `Shard.truncate`. Blocks beyond what is left will be written again: those that only this shard
        refers to lose their identity, and before one that others share the shard ends from now on: a
        reference may be dropped, but a shared block is never edited.
        """
        differs_at = shard.truncate(token_ids)
        for index in range(shard.sealed, len(shard.hashes)):
            if not self.ledger.withdraw(shard.blocks[index]):
                self._end_before(shard, index)
                break
        del shard.hashes[shard.sealed :]
        return differs_at

    def trim(self, shard: Shard, keep_from: int) -> int:
        """See `Shard.trim`; how many blocks became available. Published ones stay as a cache."""
        return self.ledger.drop(shard.trim(keep_from))

    def _end_before(self, shard: Shard, index: int) -> None:
        shard.end = shard.first + index * shard.block_tokens
        del shard.token_ids[shard.end - shard.first :]
        self.ledger.drop(shard.blocks[index:])
        del shard.blocks[index:]

    def shrink(self, shard: Shard) -> None:
        """Give back the blocks behind what is written."""
        kept = self._geometry.blocks_for(shard.written - shard.first)
        shard.end = shard.written
        self.ledger.drop(shard.blocks[kept:])
        del shard.blocks[kept:]

    def free(self, shard: Shard) -> int:
        """The shard is gone; how many blocks became available."""
        del self._shards[shard.shard_id]
        return self.ledger.drop(shard.blocks)

    def account(self) -> BlockAccount:
        """The state of every block, from the shards' lengths."""
        opened = sealed = reserved = 0
        for shard in self._shards.values():
            touched = self._geometry.blocks_for(shard.written - shard.first)
            sealed += shard.sealed
            opened += touched - shard.sealed
            reserved += len(shard.blocks) - touched
        sealed -= self.ledger.shared_surplus  # only sealed blocks have more than one referrer
        return BlockAccount(self._capacity, self.ledger.free, reserved, opened, sealed, self.ledger.cached)

    def held(self) -> dict[SequenceKey, int]:
        """How many blocks each sequence holds, shared ones included."""
        held: dict[SequenceKey, int] = {}
        for shard in self._shards.values():
            held[shard.key] = held.get(shard.key, 0) + len(shard.blocks)
        return held

    def is_consistent(self) -> bool:
        """Whether shards and ledger agree about every block."""
        return self.ledger.is_consistent(block for shard in self._shards.values() for block in shard.blocks)

    def _before(self, first: int, prefix: ShardPrefix) -> BlockHash | None:
        """The identity of what lies before `first`; None where blocks from there on are not shared."""
        if self._sharing is None or first % self._geometry.block_tokens:
            return None
        return blocks.root(self._geometry, prefix.tenant) if first == 0 else prefix.parent

    def _best_behind(self, identity: BlockHash, position: int, token_ids: Sequence[int]) -> tuple[int, int]:
        """The block of a shard at `position`, behind `identity`, that begins with most of `token_ids`, and
        with how many: a block's worth where it is full, but not published yet.
        """
        best = (-1, 0)
        for shard in self._shards.values() if token_ids else ():
            index = (position - shard.first) // shard.block_tokens
            if 0 <= index < len(shard.blocks) and shard.hash_before(index) == identity:
                same = _common(shard.block_token_ids(index), token_ids)
                best = max(best, (shard.blocks[index], same), key=_second)
        return best

    def _add(self, key: SequenceKey, first: int, end: int, own: list[int]) -> Shard:
        shard_id = ShardId(next(self._shard_ids))
        shard = self._shards[shard_id] = Shard(shard_id, key, first, end, self._geometry.block_tokens, own)
        return shard


def _second(pair: tuple[int, int]) -> int:
    return pair[1]


def _common(a: Iterable[int], b: Iterable[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
