"""The KV pool of a simulation: arenas that count blocks, and the project's own placement over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.blocks import BlockHash
from cluster.policies.instances import home_of
from cluster.policies.placement import PlacementPolicy, WorkerSpace, inadmissible, place
from cluster.policies.prefixes import Chain, Source
from cluster.types import Epoch, ShardId, ShardRef, WorkerId
from loadgen.simulation.prefixes import EPOCH, SharedBlocks

Instances = Literal["shared", "borrowing", "separate"]


@dataclass(slots=True)
class Arena:
    """One attention worker's memory, or a dense worker's own. `home`: the dense worker it belongs to. What is
    only cached counts as free.
    """

    worker: WorkerId
    capacity_blocks: int
    free_blocks: int
    home: int
    is_local: bool
    shared: SharedBlocks = field(default_factory=SharedBlocks)


class ModelledPool:
    """Owns who holds how many blocks. Reserves as a dense worker does, by `place`; what it knows of free
    space is true, where a real one's is a heartbeat old and another dense worker may have been faster.
    """

    def __init__(self, arenas: Sequence[Arena], policy: PlacementPolicy, instances: Instances) -> None:
        self.arenas = tuple(arenas)
        self._policy = policy
        self._instances = instances
        self._index = {arena.worker: place for place, arena in enumerate(arenas)}
        self._capacity = sum(arena.capacity_blocks for arena in arenas)
        self._shards = 0
        self._published: dict[ShardId, list[BlockHash]] = {}
        """Identities of a shard's first blocks."""

    @classmethod
    def local(cls, dense_workers: int, capacity_tokens: int, policy: PlacementPolicy) -> ModelledPool:
        """The cache in the dense workers themselves: each has its own."""
        blocks = capacity_tokens // policy.block_tokens
        arenas = [
            Arena(WorkerId(f"dense-{index}"), blocks, blocks, index, is_local=True)
            for index in range(dense_workers)
        ]
        return cls(arenas, policy, "separate")

    @classmethod
    def remote(
        cls,
        workers: int,
        capacity_tokens: int,
        policy: PlacementPolicy,
        dense_workers: int,
        instances: Instances,
    ) -> ModelledPool:
        """Attention workers of `capacity_tokens` each, at home with dense workers as in a cluster."""
        blocks = capacity_tokens // policy.block_tokens
        homes = {f"dense-{index}": index for index in range(dense_workers)}
        names = [WorkerId(f"attention-{index}") for index in range(workers)]
        arenas = [
            Arena(name, blocks, blocks, homes[home_of(name, dense_workers)], is_local=False) for name in names
        ]
        return cls(arenas, policy, instances)

    @property
    def used_share(self) -> float:
        """Share of all blocks in use, 0 to 1."""
        return 1 - sum(arena.free_blocks for arena in self.arenas) / self._capacity

    def index_of(self, worker: WorkerId) -> int:
        """Which of its attention workers this is to a dense worker; of a local arena there is but one."""
        place = self._index[worker]
        return 0 if self.arenas[place].is_local else place

    def arena(self, worker: WorkerId) -> Arena:
        """The arena of this name."""
        return self.arenas[self._index[worker]]

    def may_use(self, dense: int) -> Callable[[WorkerId, Epoch], bool]:
        """Whether a dense worker has a lane to a worker."""
        return lambda worker, _epoch: self._may_use(self.arena(worker), dense)

    def _may_use(self, arena: Arena, dense: int) -> bool:
        return arena.home == dense or not (arena.is_local or self._instances == "separate")

    def inadmissible(self, dense: int, tokens: int) -> str | None:
        """Why a sequence of so many tokens can never fit; None if it can."""
        return inadmissible(tokens, self._spaces(dense), self._policy)

    def reserve(self, dense: int, first: int, end: int, shards: Sequence[ShardRef]) -> list[ShardRef]:
        """Room for positions first..end of a sequence with `shards`: all shards it then has, whole; those it
        had where nothing fits.
        """
        held = list(shards)
        for allotment in place(first, end, shards, self._spaces(dense), self._policy):
            arena = self.arena(allotment.worker)
            grown = next((s for s in held if s.end == allotment.first and s.worker == arena.worker), None)
            if grown is not None:
                held.remove(grown)
            begins = grown.first if grown else allotment.first
            self._shards += 1
            shard = ShardRef(arena.worker, EPOCH, ShardId(self._shards), begins, allotment.end)
            arena.free_blocks -= self._blocks(shard) - (self._blocks(grown) if grown else 0)
            assert arena.free_blocks >= 0, "placement allots what is free"
            arena.shared.keep_at_most(arena.free_blocks)
            self._published[shard.shard] = self._published.pop(grown.shard, []) if grown else []
            held.append(shard)
        return held

    def acquire(self, sources: Iterable[Source], chain: Chain) -> list[ShardRef]:
        """Shards of what lies at these sources of a chain's blocks, up to the first that is missing."""
        size, found = self._policy.block_tokens, list[ShardRef]()
        for source in sources:
            arena = self.arena(source.worker)
            wanted = chain.hashes[source.first // size : source.end // size]
            pinned, woken = arena.shared.pin(wanted)
            arena.free_blocks -= woken
            if pinned:
                self._shards += 1
                end = source.first + len(pinned) * size
                found.append(ShardRef(arena.worker, EPOCH, ShardId(self._shards), source.first, end))
                self._published[found[-1].shard] = pinned
            if len(pinned) < len(wanted):
                break
        return found

    def publish(self, shards: Iterable[ShardRef], chain: Chain, computed: int) -> None:
        """Full blocks of a chain up to `computed` are sealed: others may refer to them."""
        size = self._policy.block_tokens
        for shard in shards:
            if shard.first % size:
                continue
            arena, published = self.arena(shard.worker), self._published[shard.shard]
            first, end = shard.first // size, min(shard.end, computed) // size
            for index in range(first + len(published), min(end, len(chain.hashes))):
                arena.free_blocks += arena.shared.publish(chain.hashes[index], index + 1)
                published.append(chain.hashes[index])

    def release(self, shards: Sequence[ShardRef]) -> None:
        """Give back whole shards."""
        for shard in shards:
            arena = self.arena(shard.worker)
            published = self._published.pop(shard.shard)
            arena.free_blocks += self._blocks(shard) - len(published) + arena.shared.drop(published)
            assert arena.free_blocks <= arena.capacity_blocks

    def _blocks(self, shard: ShardRef) -> int:
        return -(-(shard.end - shard.first) // self._policy.block_tokens)

    def _spaces(self, dense: int) -> list[WorkerSpace]:
        size = self._policy.block_tokens
        return [
            WorkerSpace(
                arena.worker,
                EPOCH,
                free_tokens=arena.free_blocks * size,
                capacity_tokens=arena.capacity_blocks * size,
                is_local=arena.is_local,
                is_home=self._instances == "shared" or arena.home == dense,
            )
            for arena in self.arenas
            if self._may_use(arena, dense)
        ]
