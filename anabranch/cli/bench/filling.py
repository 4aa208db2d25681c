"""Caches of any length without computing them: random keys and values over a lane, then a take-over.

A dense worker that adopts the sequences finds everything but their last token there, and decodes at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from cluster.types import Generation, KvGeometry, SequenceKey, ShardRef
from workers.dense.sequences import wire_generation
from workers.lanes.codec import torch_dtype
from workers.lanes.messages import Lane, LayerMessage, PlanRow
from workers.lanes.plans import PlanEncoder
from workers.peer import AttentionPeer, ShardPrefix

FIRST_GENERATION = 1
_CHUNK_TOKENS = 1024
_DEADLINE_MS = 60_000
_TOKENS = 40_000


def token_ids(key: SequenceKey, context_tokens: int) -> tuple[int, ...]:
    """The tokens of a filled sequence, the last of which is not cached. Each sequence has others: blocks of
    equal tokens would be shared, and read from the processor's caches.
    """
    return (1 + zlib.crc32(key.request_id.encode()) % _TOKENS,) * (context_tokens + 1)


class Filler:
    """Fills shards of one attention worker over a lane of its own."""

    def __init__(self, peer: AttentionPeer, geometry: KvGeometry) -> None:
        self._peer = peer
        self._lane: Lane = peer.open_lane()
        self._geometry = geometry
        self._step = 0
        shape = (_CHUNK_TOKENS, geometry.kv_heads, geometry.head_size)
        generator = torch.Generator().manual_seed(0)
        self._keys = torch.randn(shape, generator=generator).to(torch_dtype(geometry))
        self._query = torch.zeros(1, geometry.query_heads, geometry.head_size, dtype=self._keys.dtype)

    def fill(self, keys: Sequence[SequenceKey], context_tokens: int, more_tokens: int) -> list[ShardRef]:
        """A shard for each sequence with `context_tokens` committed and room for `more_tokens`."""
        generation = wire_generation(FIRST_GENERATION, 0)
        shards = []
        for key in keys:
            end = context_tokens + more_tokens
            shard = self._peer.reserve(key, generation, 0, end, ShardPrefix("bench")).shard
            tokens = token_ids(key, context_tokens)
            for start in range(0, context_tokens, _CHUNK_TOKENS):
                self._append(
                    shard, generation, start, tokens[start : min(start + _CHUNK_TOKENS, context_tokens)]
                )
            self._commit(shard, generation, context_tokens, tokens[-1:])
            shards.append(shard)
        return shards

    def close(self) -> None:
        """Close the lane."""
        self._lane.close()

    def _append(self, shard: ShardRef, generation: Generation, start: int, ids: tuple[int, ...]) -> None:
        """A chunk's keys and values, layer by layer; what it could see is not attended."""
        row = PlanRow(shard.shard, generation, start, len(ids), 0, 0, ids)
        self._begin(row)
        for layer in range(1, self._geometry.layers + 1):
            keys = self._keys[: len(ids)]
            self._lane.send(LayerMessage(self._step, 0, layer, _DEADLINE_MS, key=keys, value=keys))

    def _commit(self, shard: ShardRef, generation: Generation, length: int, ids: tuple[int, ...]) -> None:
        """Name what comes next, and hear that all before it is there."""
        row = PlanRow(shard.shard, generation, length, 1, 0, length, ids)
        self._begin(row, self._query)
        self._lane.receive(self._step, 0, 0, torch.inf)

    def _begin(self, row: PlanRow, query: torch.Tensor | None = None) -> None:
        self._step += 1
        plan = PlanEncoder().encode(self._step, 0, [row])
        self._lane.send(LayerMessage(self._step, 0, 0, _DEADLINE_MS, plan, query))
