"""Who holds which blocks: sequences, their shards, generations, leases, and the account of the arena.

The store owns the facts of one attention worker's memory (DESIGN: the attention worker owns its blocks).
Every public method takes the store's lock, which the attend session also holds while it computes: a
block is never freed under a kernel that reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from cluster.clock import Clock
from cluster.errors import Fenced, Internal, InvalidRequest, LeaseOver, ResourceExhausted, Unavailable
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, ShardId, ShardRef, WorkerId
from workers.attention.fences import Fences
from workers.attention.holding import Holding
from workers.attention.shard import Shard
from workers.attention.shard_blocks import BlockAccount, ShardBlocks, Sharing
from workers.attention.turns import Turns
from workers.peer import Acquisition, Adoption, HeldShard, Reservation, ShardPrefix

_OF_NOBODY = ShardPrefix()


class Store:
    """The sequences of one arena.

    A sequence's generation only rises: whoever speaks under a lower one than was seen is Fenced, also for
    some time after the sequence ended (see `Fences`).
    """

    def __init__(
        self,
        worker: WorkerId,
        epoch: Epoch,
        geometry: KvGeometry,
        capacity: int,
        lease_ms: int,
        clock: Clock,
        sharing: Sharing | None = None,
        last_layers_s: float = 0.5,
    ) -> None:
        """`capacity` in blocks. Without `sharing` nothing is shared. `last_layers_s`: see `release`."""
        self.worker = worker
        self.epoch = epoch
        self.geometry = geometry
        self.turns = Turns()
        self.changes = 0
        """Grows when anything held is given up or changes hands."""
        self.leases_expired = 0
        self.draining = False
        self.empty = threading.Event()
        """Set while no sequence is held: a draining worker may leave."""
        self.empty.set()
        self._lease_ms = lease_ms
        self._clock = clock
        self._last_layers_s = last_layers_s
        self._blocks = ShardBlocks(geometry, capacity, sharing)
        self.allocator = self._blocks.ledger.allocator
        """Which blocks are free. For who holds `turns`."""
        self._holdings: dict[SequenceKey, Holding] = {}
        self._fences = Fences(lease_ms, clock)

    @property
    def available(self) -> int:
        """Blocks that could be reserved."""
        return self._blocks.ledger.available

    def reserve(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        end: int,
        prefix: ShardPrefix = _OF_NOBODY,
        *,
        apart: bool = False,
    ) -> Reservation:
        """Reserve positions first..end, extending the own shard that ends at `first` if there is one and not
        `apart`.

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
                holding = self._begin(key, generation, self.geometry.blocks_for(end - first))
            shard = self._extend(holding, first, end, apart)
            self._blocks.learn_parent(shard, prefix)
            holding.lease_end_s = self._lease_end()
            return Reservation(self._ref(shard), self._lease_ms, self.available)

    def acquire(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        token_ids: Sequence[int],
        prefix: ShardPrefix = _OF_NOBODY,
    ) -> Acquisition:
        """Begin a shard at `first` with what lies here already of its `token_ids`, pinned under the
        sequence's lease (see `ShardBlocks.acquire`). Raises as `reserve` does.
        """
        chain = self._blocks.identify(first, token_ids, prefix)
        with self.turns:
            self._check_alive(key, generation)
            held = self._holdings.get(key)
            holding = held if held is not None and held.generation == generation else None
            if holding is not None:
                holding.check_apart(first, first + len(token_ids))
            elif self.draining:
                raise _draining(self.worker)
            shard = self._blocks.acquire(key, first, token_ids, chain) if chain is not None else None
            if shard is None:
                return Acquisition(None, self.available)
            if holding is None:
                holding = self._begin(key, generation, 0)
            holding.shards.append(shard)
            holding.lease_end_s = self._lease_end()
            return Acquisition(self._held_shard(holding, shard), self.available)

    def release(self, key: SequenceKey, generation: Generation, computed_end: int = 0) -> int:
        """Drop all shards of a sequence and fence its generation; returns how many blocks became available.
        Idempotent.

        Positions before `computed_end` were computed by steps that are over: no row will follow that makes
        the last one certain, so it becomes certain now, and its full blocks stay as a cache. Its last layers
        may still be on their way, which this call overtook: they are waited for, at most `last_layers_s`.
        """
        with self.turns:
            holding = self._holdings.get(key)
            due = holding.arrivals(computed_end) if holding is not None else []
        for arrival in due:
            arrival.wait(self._last_layers_s)
        with self.turns:
            self._check_not_lower(key, generation)
            holding = self._holdings.get(key)
            if holding is not None and holding.generation == generation:
                for shard in holding.by_position:
                    if shard.pending is not None and shard.pending.arrival.is_complete:
                        self._blocks.commit(shard, computed_end)
            self._fences.raise_to(key, generation)
            return self._drop(key)

    def release_shard(self, key: SequenceKey, generation: Generation, shard_id: ShardId) -> int:
        """Free one shard of a sequence that goes on elsewhere; returns how many blocks became available.
        Idempotent. Raises Fenced.
        """
        with self.turns:
            self._check_not_lower(key, generation)
            holding = self._holdings.get(key)
            shard = self._blocks.get(shard_id)
            if holding is None or shard is None or shard.key != key or holding.generation > generation:
                return 0
            freed = self._free(holding, shard)
            if not holding.shards:
                self._drop(key)
            return freed

    def shrink(self, key: SequenceKey, generation: Generation, shard_id: ShardId) -> HeldShard | None:
        """Give back a shard's room behind what is committed, and the shard where that is nothing; what is
        left of it.
        """
        with self.turns:
            holding, shard = self._holdings.get(key), self._blocks.get(shard_id)
            if holding is None or shard is None or holding.generation != generation:
                return None
            if shard.committed == shard.first:
                self._free(holding, shard)
                return None
            self._blocks.shrink(shard)
            return self._held_shard(holding, shard)

    def fill(self, shard: Shard, token_ids: Sequence[int]) -> None:
        """Positions from the committed length on were written by a copy: they are certain. The caller holds
        `turns`.
        """
        assert self.turns.is_mine
        assert shard.pending is None
        shard.token_ids += token_ids
        assert shard.committed <= shard.end
        self._blocks.publish(shard)

    def trim(self, key: SequenceKey, generation: Generation, keep_from: int) -> int:
        """Give up whole blocks before `keep_from`, which no row of the sequence sees any more; returns how
        many became available. A sequence of which nothing is left here keeps its lease and its generation.
        Idempotent. Raises Fenced, also where `keep_from` is not certain yet.

        A step under way was planned for rows at or behind those the position was computed from, so what it
        sees lies at `keep_from` or behind it. `PreparedStep` looks all the same, and fails closed.
        """
        with self.turns:
            self._check_not_lower(key, generation)
            holding = self._holdings.get(key)
            if holding is None or holding.generation < generation:
                return 0
            freed = 0
            for shard in reversed(holding.by_position):
                if shard.end <= keep_from:
                    freed += self._free(holding, shard)
                else:  # the one that may refuse comes before any that is freed
                    freed += self._blocks.trim(shard, keep_from)
            holding.lease_end_s = self._lease_end()
            self.changes += 1
            return freed

    def renew(self, keys: Iterable[SequenceKey]) -> tuple[SequenceKey, ...]:
        """Renew leases; returns the sequences that hold nothing here."""
        with self.turns:
            named = {key: self._holdings.get(key) for key in keys}
            for holding in named.values():
                if holding is not None:
                    holding.lease_end_s = self._lease_end()
            return tuple(key for key, holding in named.items() if holding is None)

    def adopt(self, key: SequenceKey, generation: Generation, token_ids: Sequence[int]) -> Adoption:
        """Take a sequence over: fence every lower generation, truncate each shard to the longest committed
        prefix that `token_ids` confirm, free shards of which nothing is left. Raises Fenced.

        Repeated under the same generation (the answer was lost) it shows what is held, and what was found.
        """
        with self.turns:
            self._check_alive(key, generation)
            self._fences.raise_to(key, Generation(generation - 1))
            holding = self._holdings.get(key)
            if holding is None:
                return Adoption()
            if holding.generation < generation:
                self._take_over(holding, generation, token_ids)
            holding.lease_end_s = self._lease_end()
            return Adoption(self._held(holding), holding.first_difference)

    def locate(self, key: SequenceKey) -> tuple[HeldShard, ...]:
        """The sequence's shards here, possibly none."""
        with self.turns:
            holding = self._holdings.get(key)
            return self._held(holding) if holding else ()

    def commit(self, shard: Shard, start: int) -> None:
        """A row begins at `start`: what was appended before it is certain, and its full blocks are published.
        The caller holds `turns`. Raises Fenced where layers are missing.
        """
        assert self.turns.is_mine
        self._blocks.commit(shard, start)

    def shard(self, shard_id: ShardId, generation: Generation) -> Shard:
        """A shard as a plan row names it; renews its lease. The caller holds `turns`. Raises Fenced."""
        assert self.turns.is_mine
        shard = self._blocks.get(shard_id)
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
        is_here = self._blocks.get(shard.shard_id) is not None
        return is_here and self._holdings[shard.key].generation == generation

    def expire(self) -> tuple[SequenceKey, ...]:
        """Free every sequence whose lease is over; returns them."""
        with self.turns:
            now_s = self._clock()
            over = tuple(key for key, holding in self._holdings.items() if holding.lease_end_s <= now_s)
            self._end_leases(over)
            self.leases_expired += len(over)
            return over

    def forsake(self) -> int:
        """Nobody is left who could use what is held: end every lease now. Returns how many sequences go."""
        with self.turns:
            self._end_leases(held := tuple(self._holdings))
            return len(held)

    def account(self) -> BlockAccount:
        """The account, from every shard's lengths."""
        with self.turns:
            return self._blocks.account()

    def blocks_held(self) -> dict[SequenceKey, int]:
        """How many blocks each sequence holds."""
        with self.turns:
            return self._blocks.held()

    def audit(self) -> BlockAccount:
        """The account, after a look at every block. Raises Internal where it does not add up."""
        with self.turns:
            account = self._blocks.account()
            if account.total != account.capacity or not self._blocks.is_consistent():
                raise Internal(f"the blocks of {self.worker} do not add up: {account}")
            return account

    def holdings(self) -> tuple[tuple[SequenceKey, tuple[HeldShard, ...], float], ...]:
        """Every sequence with its shards and the seconds its lease has left."""
        with self.turns:
            now_s = self._clock()
            return tuple(
                (key, self._held(holding), max(0.0, holding.lease_end_s - now_s))
                for key, holding in self._holdings.items()
            )

    def _end_leases(self, keys: Iterable[SequenceKey]) -> None:
        for key in keys:
            self._fences.raise_to(key, self._holdings[key].generation)
            self._drop(key)

    def _begin(self, key: SequenceKey, generation: Generation, wanted: int) -> Holding:
        """A new holding, in place of one of a lower generation, where `wanted` blocks can be had then;
        otherwise the older one stays. Raises Unavailable, ResourceExhausted.
        """
        if self.draining:
            raise _draining(self.worker)
        older = self._holdings.get(key)
        given_up = [block for shard in older.shards for block in shard.blocks] if older else []
        room = self._blocks.ledger.available + self._blocks.ledger.releasable(given_up)
        if wanted > room:
            raise ResourceExhausted(f"{key}: {wanted} blocks asked for, {room} can be had")
        self._drop(key)
        holding = self._holdings[key] = Holding(key, generation, self._lease_end())
        self.empty.clear()
        return holding

    def _check_not_lower(self, key: SequenceKey, generation: Generation) -> None:
        holding = self._holdings.get(key)
        seen = holding.generation if holding else self._fences.highest(key)
        if generation < seen:
            raise Fenced(f"{key}: generation {generation} spoke after {seen}")

    def _check_alive(self, key: SequenceKey, generation: Generation) -> None:
        self._check_not_lower(key, generation)
        if generation <= self._fences.highest(key):
            raise LeaseOver(f"{key}: generation {generation} was released")

    def _take_over(self, holding: Holding, generation: Generation, token_ids: Sequence[int]) -> None:
        holding.generation, holding.first_difference = generation, None
        self.changes += 1
        for shard in holding.by_position:
            # Keys and values depend on every token before them: after one that differs nothing is right.
            is_void = holding.first_difference is not None
            differs_at = self._blocks.truncate(shard, () if is_void else token_ids)
            if not is_void:
                holding.first_difference = differs_at
            if shard.committed == shard.first:
                self._free(holding, shard)
        if not holding.shards:
            self._drop(holding.key)

    def _extend(self, holding: Holding, first: int, end: int, apart: bool) -> Shard:
        holding.check_apart(first, end)
        for shard in holding.shards:
            if shard.end == first and not apart:
                self._blocks.extend(shard, end)
                return shard
        shard = self._blocks.reserve(holding.key, first, end)
        holding.shards.append(shard)
        return shard

    def _free(self, holding: Holding, shard: Shard) -> int:
        holding.shards.remove(shard)
        self.changes += 1
        return self._blocks.free(shard)

    def _drop(self, key: SequenceKey) -> int:
        """Drop all shards of a sequence, the last first, since a cached block is of use only while those
        before it are; returns how many blocks became available.
        """
        holding = self._holdings.pop(key, None)
        if holding is None:
            return 0
        freed = sum(self._free(holding, shard) for shard in reversed(holding.by_position))
        if not self._holdings:
            self.empty.set()
        return freed

    def _held(self, holding: Holding) -> tuple[HeldShard, ...]:
        return tuple(self._held_shard(holding, shard) for shard in holding.by_position)

    def _held_shard(self, holding: Holding, shard: Shard) -> HeldShard:
        committed = shard.committed - shard.first
        return HeldShard(self._ref(shard), committed, len(shard.blocks), holding.generation)

    def _ref(self, shard: Shard) -> ShardRef:
        return ShardRef(self.worker, self.epoch, shard.shard_id, shard.first, shard.end)

    def _lease_end(self) -> float:
        return self._clock() + self._lease_ms / 1000


def _draining(worker: WorkerId) -> Unavailable:
    return Unavailable(f"{worker} is draining; reserve elsewhere")
