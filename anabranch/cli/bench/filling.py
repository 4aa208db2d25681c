"""Caches of any length without computing them: random keys and values over a lane, then a take-over.

A dense worker that adopts the sequences finds everything but their last token there, and decodes at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cluster.types import Generation, KvGeometry, SequenceKey, ShardRef
from workers.dense.sequences import wire_generation
from workers.lanes.codec import torch_dtype
from workers.lanes.messages import Lane, LayerMessage, PlanRow
from workers.lanes.plans import PlanEncoder
from workers.peer import AttentionPeer, ShardPrefix

FIRST_GENERATION = 1
CHUNK_TOKENS = 1024
_DEADLINE_MS = 60_000
_TOKENS = 40_000


def token_ids(key: SequenceKey, context_tokens: int) -> tuple[int, ...]:
    """The tokens of a filled sequence, the last of which is not cached. Each sequence has others: blocks of
    equal tokens would be shared, and read from the processor's caches.
    """
    return (1 + zlib.crc32(key.request_id.encode()) % _TOKENS,) * (context_tokens + 1)


Contents = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""Keys, already rotated, and values of a layer's positions first..end: [tokens, kv_heads, head_size] each."""


class Filler:
    """Fills shards of one attention worker over a lane of its own."""

    def __init__(self, peer: AttentionPeer, geometry: KvGeometry, contents: Contents | None = None) -> None:
        """Without `contents` every chunk gets the same random numbers, for keys and for values."""
        self._peer = peer
        self._lane: Lane = peer.open_lane()
        self._geometry = geometry
        self._step = 0
        shape = (CHUNK_TOKENS, geometry.kv_heads, geometry.head_size)
        generator = torch.Generator().manual_seed(0)
        same = torch.randn(shape, generator=generator).to(torch_dtype(geometry))
        self._contents = contents or (lambda _layer, first, end: (same[: end - first],) * 2)
        self._query = torch.zeros(1, geometry.query_heads, geometry.head_size, dtype=same.dtype)

    def fill(self, keys: Sequence[SequenceKey], context_tokens: int, more_tokens: int) -> list[ShardRef]:
        """A shard for each sequence with `context_tokens` committed and room for `more_tokens`."""
        return [
            self.fill_shard(key, 0, token_ids(key, context_tokens), context_tokens, more_tokens)
            for key in keys
        ]

    def fill_shard(
        self, key: SequenceKey, first: int, tokens: Sequence[int], end: int, more_tokens: int = 0
    ) -> ShardRef:
        """A shard of positions first..end of a sequence of `tokens`, all committed, and room for more."""
        generation = wire_generation(FIRST_GENERATION, 0)
        shard = self._peer.reserve(key, generation, first, end + more_tokens, ShardPrefix("bench")).shard
        for start in range(first, end, CHUNK_TOKENS):
            self._append(shard, generation, start, tuple(tokens[start : min(start + CHUNK_TOKENS, end)]))
        self._commit(shard, generation, first, end)
        return shard

    def close(self) -> None:
        """Close the lane."""
        self._lane.close()

    def _append(self, shard: ShardRef, generation: Generation, start: int, ids: tuple[int, ...]) -> None:
        """A chunk's keys and values, layer by layer; what it could see is not attended."""
        row = PlanRow(shard.shard, generation, start, len(ids), 0, 0, ids)
        self._begin(row)
        for layer in range(1, self._geometry.layers + 1):
            key, value = self._contents(layer - 1, start, start + len(ids))
            self._lane.send(LayerMessage(self._step, 0, layer, _DEADLINE_MS, key=key, value=value))

    def _commit(self, shard: ShardRef, generation: Generation, first: int, end: int) -> None:
        """Name what comes next, and hear that all before it is there."""
        row = PlanRow(shard.shard, generation, end, 1, first, end)
        self._begin(row, self._query)
        self._lane.receive(self._step, 0, 0, torch.inf)

    def _begin(self, row: PlanRow, query: Tensor | None = None) -> None:
        self._step += 1
        plan = PlanEncoder().encode(self._step, 0, [row])
        self._lane.send(LayerMessage(self._step, 0, 0, _DEADLINE_MS, plan, query))
