"""An attention worker's memory in small: a geometry, a store, and a step with everything it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.clock import ManualClock
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, ShardRef, WorkerId
from workers.attention.arena import Arena
from workers.attention.journal import Journal
from workers.attention.prepared_step import PreparedStep
from workers.attention.shard_blocks import CopyBlock, Sharing
from workers.attention.store import Store
from workers.kernels.signature import CacheLayout
from workers.kernels.token_major import TOKEN_MAJOR
from workers.lanes.messages import PlanRow

LEASE_MS = 1000


def build_geometry(block_tokens: int = 4, layers: int = 2, head_size: int = 8) -> KvGeometry:
    """Four query heads over two KV heads, float32."""
    return KvGeometry(layers, 4, 2, head_size, "float32", block_tokens, "digest")


def build_store(
    blocks: int = 16,
    clock: ManualClock | None = None,
    geometry: KvGeometry | None = None,
    copy_block: CopyBlock | None = None,
) -> Store:
    """An empty store whose leases last a second; without `copy_block` nothing is shared."""
    geometry = geometry or build_geometry()
    clock = clock or ManualClock()
    sharing = Sharing(copy_block, Journal()) if copy_block is not None else None
    return Store(WorkerId("attention-0"), Epoch(7), geometry, blocks, LEASE_MS, clock, sharing)


def key(name: str = "a") -> SequenceKey:
    """A sequence."""
    return SequenceKey(name)


def generation(number: int) -> Generation:
    """One life of a sequence."""
    return Generation(number)


@dataclass
class Memory:
    """A store with its arena, and every key and value written: what attention must have read."""

    store: Store
    arena: Arena
    clock: ManualClock
    written: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(layer, shard id, position) -> key, value: [kv_heads, head_size] each."""

    def reserve(self, name: str, first: int, end: int, life: int = 1) -> ShardRef:
        """Room for positions first..end of a sequence."""
        return self.store.reserve(key(name), generation(life), first, end).shard

    def begin(self, *rows: PlanRow) -> PreparedStep:
        """A step, prepared under the store's turn."""
        with self.store.turns:
            return PreparedStep(self.store, self.arena, rows)

    def append(self, step: PreparedStep, rows: Sequence[PlanRow], layer: int) -> None:
        """Write one layer of a step's chunks with random keys and values, and remember them."""
        tails = [row for row in rows if row.token_ids]
        geometry = self.arena.geometry
        shape = (sum(row.count for row in tails), geometry.kv_heads, geometry.head_size)
        keys, values = torch.randn(shape), torch.randn(shape)
        with self.store.turns:
            step.append(layer, keys, values)
        places = [(int(row.shard), row.start + offset) for row in tails for offset in range(row.count)]
        for index, (shard, position) in enumerate(places):
            self.written[layer, shard, position] = keys[index], values[index]

    def run(self, *rows: PlanRow) -> None:
        """A whole step: every layer of every chunk."""
        step = self.begin(*rows)
        for layer in range(self.arena.geometry.layers):
            self.append(step, rows, layer)

    def contents(self, name: str, tokens: int) -> Tensor:
        """Keys and values of a sequence's first positions, as its own step would read them:
        [2, layers, tokens, kv_heads, head_size].
        """
        shard = self.store.locate(key(name))[0].shard
        (span,) = self.begin(reading(shard, tokens)).spans
        size = self.arena.geometry.block_tokens
        slots = [span.blocks[position // size] * size + position % size for position in range(tokens)]
        return self.arena.read(torch.tensor(slots))

    def committed(self, name: str) -> list[tuple[int, int]]:
        """Positions first..committed of each of a sequence's shards."""
        held = self.store.locate(key(name))
        return [(shard.shard.first, shard.shard.first + shard.committed_tokens) for shard in held]


def build_memory(
    blocks: int = 16,
    block_tokens: int = 4,
    layers: int = 2,
    clock: ManualClock | None = None,
    device: str = "cpu",
    sharing: bool = False,
    layout: CacheLayout = TOKEN_MAJOR,
    head_size: int = 8,
) -> Memory:
    """An empty store and its arena, every number of which is NaN until it is written."""
    geometry = build_geometry(block_tokens, layers, head_size)
    arena = Arena(geometry, blocks, torch.device(device), layout)
    slots = torch.arange(blocks * block_tokens, device=device)
    arena.write(slots, torch.full_like(arena.read(slots), torch.nan))
    clock = clock or ManualClock()
    copy_block = arena.copy_block if sharing else None
    return Memory(build_store(blocks, clock, geometry, copy_block), arena, clock)


def chunk(
    shard: ShardRef,
    start: int,
    count: int,
    *,
    life: int = 1,
    visible: tuple[int, int] | None = None,
    token: int = 0,
) -> PlanRow:
    """A tail's row: token ids are position + `token`; everything before it in the shard is visible."""
    first, end = visible or (shard.first, start)
    ids = tuple(token + position for position in range(start, start + count))
    return PlanRow(shard.shard, generation(life), start, count, first, end, ids)


def reading(
    shard: ShardRef, start: int, count: int = 1, *, life: int = 1, visible: tuple[int, int] | None = None
) -> PlanRow:
    """A row that appends nothing here; the whole shard up to `start` is visible."""
    first, end = visible or (shard.first, min(start, shard.end))
    return PlanRow(shard.shard, generation(life), start, count, first, end)
