"""Who holds which blocks: sequences, their shards, generations, leases, and the account of the arena.

The store owns the facts of one attention worker's memory (DESIGN: the attention worker owns its blocks).
Every public method takes the store's lock, which the attend session also holds while it computes: a
block is never freed under a kernel that reads it.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.clock import Clock
from cluster.errors import Fenced, Internal, InvalidRequest, ResourceExhausted, Unavailable
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, ShardId, ShardRef, WorkerId
from workers.attention.arena import BlockAllocator
from workers.attention.shard import Shard
from workers.attention.turns import Turns
from workers.peer import HeldShard, Reservation

_FENCES_MOST = 65_536
_NEVER = Generation(-1)


@dataclass(frozen=True, slots=True)
class BlockAccount:
    """free + reserved + open + sealed_referenced + sealed_cached = capacity."""

    capacity: int
    free: int
    reserved: int
    open: int
    sealed_referenced: int
    sealed_cached: int


@dataclass(slots=True, eq=False)
class Holding:
    """One sequence's shards here, under one generation and one lease."""

    key: SequenceKey
    generation: Generation
    lease_end_s: float
    shards: list[Shard] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks of all shards."""
        return sum(len(shard.blocks) for shard in self.shards)


class Store:
    """The sequences of one arena.

    A sequence's generation only rises: whoever speaks under a lower one than was seen is Fenced, also
    after the sequence was released (the last `_FENCES_MOST` released ones are remembered).
    """

    def __init__(
        self,
        worker: WorkerId,
        epoch: Epoch,
        geometry: KvGeometry,
        blocks: int,
        lease_ms: int,
        clock: Clock,
    ) -> None:
        self.worker = worker
        self.epoch = epoch
        self.geometry = geometry
        self.turns = Turns()
        self.changes = 0
        """Grows when a shard is freed or its owner changes: while it stands still, what was held is held."""
        self.leases_expired = 0
        self.draining = False
        self.empty = threading.Event()
        """Set while no sequence is held: a draining worker may leave."""
        self.empty.set()
        self._lease_ms = lease_ms
        self._clock = clock
        self._capacity = blocks
        self._allocator = BlockAllocator(blocks)
        self._holdings: dict[SequenceKey, Holding] = {}
        self._shards: dict[ShardId, Shard] = {}
        self._fences: OrderedDict[SequenceKey, Generation] = OrderedDict()
        self._shard_ids = itertools.count(1)

    def reserve(self, key: SequenceKey, generation: Generation, first: int, end: int) -> Reservation:
        """Reserve positions first..end, extending the own shard that ends at `first` if there is one.

        A higher generation than the one that holds the sequence starts from nothing, in its blocks.
        Raises ResourceExhausted, Fenced, Unavailable (draining: nothing new begins here), InvalidRequest
        (range empty or taken); each of them changes nothing.
        """
        with self.turns:
            if not 0 <= first < end:
                raise InvalidRequest(f"{key}: {first}..{end} is no range of positions")
            self._check_alive(key, generation)
            holding = self._holdings.get(key)
            if holding is None or holding.generation < generation:
                holding = self._begin(key, generation, end - first)
            shard = self._extend(holding, first, end)
            holding.lease_end_s = self._lease_end()
            return Reservation(self._ref(shard), self._lease_ms, self._allocator.free)

    def release(self, key: SequenceKey, generation: Generation) -> int:
        """Free all shards of a sequence and fence its generation; returns the blocks freed. Idempotent."""
        with self.turns:
            self._check_not_lower(key, generation)
            self._fence(key, generation)
            return self._drop(key)

    def renew(self, keys: Iterable[SequenceKey]) -> tuple[SequenceKey, ...]:
        """Renew leases; returns the sequences that hold nothing here."""
        with self.turns:
            unknown = []
            for key in keys:
                holding = self._holdings.get(key)
                if holding is None:
                    unknown.append(key)
                else:
                    holding.lease_end_s = self._lease_end()
            return tuple(unknown)

    def adopt(
        self, key: SequenceKey, generation: Generation, token_ids: Sequence[int]
    ) -> tuple[HeldShard, ...]:
        """Take a sequence over: fence every lower generation, truncate each shard to the longest committed
        prefix that `token_ids` confirm, free shards of which nothing is left. Raises Fenced.

        Repeated under the same generation (the answer was lost) it shows what is held.
        """
        with self.turns:
            self._check_alive(key, generation)
            self._fence(key, Generation(generation - 1))
            holding = self._holdings.get(key)
            if holding is None:
                return ()
            if holding.generation < generation:
                self._take_over(holding, generation, token_ids)
            holding.lease_end_s = self._lease_end()
            return self._held(holding)

    def locate(self, key: SequenceKey) -> tuple[HeldShard, ...]:
        """The sequence's shards here, possibly none."""
        with self.turns:
            holding = self._holdings.get(key)
            return self._held(holding) if holding else ()

    def shard(self, shard_id: ShardId, generation: Generation) -> Shard:
        """A shard as a plan row names it; renews its lease. The caller holds `turns`. Raises Fenced."""
        assert self.turns.is_mine
        shard = self._shards.get(shard_id)
        if shard is None:
            raise Fenced(f"shard {shard_id} is not held by {self.worker}", shards=str(shard_id))
        holding = self._holdings[shard.key]
        if holding.generation != generation:
            raise shard.fenced(f"generation {generation} spoke, {holding.generation} holds it")
        holding.lease_end_s = self._lease_end()
        return shard

    def is_held(self, shard: Shard, generation: Generation) -> bool:
        """Whether a shard is still here under that generation. The caller holds `turns`."""
        assert self.turns.is_mine
        return shard.shard_id in self._shards and self._holdings[shard.key].generation == generation

    def expire(self) -> tuple[SequenceKey, ...]:
        """Free every sequence whose lease is over; returns them."""
        with self.turns:
            now_s = self._clock()
            over = [key for key, holding in self._holdings.items() if holding.lease_end_s <= now_s]
            for key in over:
                self._fence(key, self._holdings[key].generation)
                self._drop(key)
            self.leases_expired += len(over)
            return tuple(over)

    def account(self) -> BlockAccount:
        """The account, from every shard's lengths."""
        with self.turns:
            return self._account()

    def audit(self) -> BlockAccount:
        """The account, after a look at every block. Raises Internal where it does not add up."""
        with self.turns:
            held = [block for shard in self._shards.values() for block in shard.blocks]
            account = self._account()
            states = (account.free, account.reserved, account.open)
            total = sum(states) + account.sealed_referenced + account.sealed_cached
            if total != account.capacity or not self._allocator.are_all_used(held):
                raise Internal(f"the blocks of {self.worker} do not add up: {account}, {len(held)} held")
            return account

    def holdings(self) -> tuple[tuple[SequenceKey, tuple[HeldShard, ...], float], ...]:
        """Every sequence with its shards and the seconds its lease has left."""
        with self.turns:
            now_s = self._clock()
            return tuple(
                (key, self._held(holding), max(0.0, holding.lease_end_s - now_s))
                for key, holding in self._holdings.items()
            )

    def _account(self) -> BlockAccount:
        opened = sealed = reserved = 0
        for shard in self._shards.values():
            full = (shard.committed - shard.first) // shard.block_tokens
            touched = self.geometry.blocks_for(shard.written - shard.first)
            sealed += full
            opened += touched - full
            reserved += len(shard.blocks) - touched
        return BlockAccount(self._capacity, self._allocator.free, reserved, opened, sealed, 0)

    def _begin(self, key: SequenceKey, generation: Generation, tokens: int) -> Holding:
        """A new holding, in place of one of a lower generation, where a shard of `tokens` fits in what is
        free then; otherwise the older one stays. Raises Unavailable, ResourceExhausted.
        """
        if self.draining:
            raise Unavailable(f"{self.worker} is draining; reserve elsewhere")
        older = self._holdings.get(key)
        room = self._allocator.free + (older.blocks if older else 0)
        if self.geometry.blocks_for(tokens) > room:
            raise ResourceExhausted(f"{key}: {tokens} tokens asked for, {room} blocks can be had")
        self._drop(key)
        holding = self._holdings[key] = Holding(key, generation, self._lease_end())
        self.empty.clear()
        return holding

    def _check_not_lower(self, key: SequenceKey, generation: Generation) -> None:
        holding = self._holdings.get(key)
        seen = holding.generation if holding else self._fences.get(key, _NEVER)
        if generation < seen:
            raise Fenced(f"{key}: generation {generation} spoke after {seen}")

    def _check_alive(self, key: SequenceKey, generation: Generation) -> None:
        self._check_not_lower(key, generation)
        if generation <= self._fences.get(key, _NEVER):
            raise Fenced(f"{key}: generation {generation} was released")

    def _take_over(self, holding: Holding, generation: Generation, token_ids: Sequence[int]) -> None:
        holding.generation = generation
        self.changes += 1
        agrees = True
        for shard in sorted(holding.shards, key=_first_position):
            # Keys and values depend on every token before them: after one that differs nothing is right.
            agrees = shard.truncate(token_ids if agrees else ()) and agrees
            if shard.committed == shard.first:
                self._free(holding, shard)
        if not holding.shards:
            self._drop(holding.key)

    def _extend(self, holding: Holding, first: int, end: int) -> Shard:
        for shard in holding.shards:
            if shard.first < end and first < shard.end:
                raise InvalidRequest(f"{holding.key}: {first}..{end} overlaps shard {shard.shard_id}")
        for shard in holding.shards:
            if shard.end == first:
                wanted = self.geometry.blocks_for(end - shard.first) - len(shard.blocks)
                shard.blocks += self._allocator.allocate(wanted, after=shard.blocks[-1])
                shard.end = end
                return shard
        shard = Shard(
            shard_id=ShardId(next(self._shard_ids)),
            key=holding.key,
            first=first,
            end=end,
            block_tokens=self.geometry.block_tokens,
            blocks=self._allocator.allocate(self.geometry.blocks_for(end - first)),
        )
        holding.shards.append(shard)
        self._shards[shard.shard_id] = shard
        return shard

    def _free(self, holding: Holding, shard: Shard) -> None:
        holding.shards.remove(shard)
        del self._shards[shard.shard_id]
        self._allocator.give_back(shard.blocks)
        self.changes += 1

    def _drop(self, key: SequenceKey) -> int:
        holding = self._holdings.pop(key, None)
        if holding is None:
            return 0
        blocks = holding.blocks
        for shard in list(holding.shards):
            self._free(holding, shard)
        if not self._holdings:
            self.empty.set()
        return blocks

    def _fence(self, key: SequenceKey, generation: Generation) -> None:
        self._fences[key] = max(generation, self._fences.get(key, _NEVER))
        self._fences.move_to_end(key)
        while len(self._fences) > _FENCES_MOST:
            self._fences.popitem(last=False)

    def _held(self, holding: Holding) -> tuple[HeldShard, ...]:
        return tuple(
            HeldShard(self._ref(shard), shard.committed - shard.first, len(shard.blocks), holding.generation)
            for shard in sorted(holding.shards, key=_first_position)
        )

    def _ref(self, shard: Shard) -> ShardRef:
        return ShardRef(self.worker, self.epoch, shard.shard_id, shard.first, shard.end)

    def _lease_end(self) -> float:
        return self._clock() + self._lease_ms / 1000


def _first_position(shard: Shard) -> int:
    return shard.first
