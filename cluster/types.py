"""Names for facts that look alike and are not: one type each.

Vocabulary: a *sequence* is one choice of one request; a *shard* is a contiguous token range of one
sequence on one attention worker; an *epoch* is one life of a process; a *generation* counts the
resubmissions of a request.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NewType

WorkerId = NewType("WorkerId", str)
"""Stable name of a worker slot, such as `attention-1`, or of a further arena in it; survives restarts."""

Epoch = NewType("Epoch", int)
"""One incarnation of a process: 64 random bits, compared for equality only."""

Generation = NewType("Generation", int)
"""Raised by whoever resubmits or preempts a sequence; a lower one is fenced."""

ShardId = NewType("ShardId", int)
"""Names a shard within one epoch of one attention worker; never reused in that epoch."""

WIRE_VERSION = 3
"""Version of protos and lane frames together."""

LAYOUT_VERSION = 1
"""Version of the bytes of a block."""


def draw_epoch() -> Epoch:
    """A fresh epoch; never zero, so that zero can mean "not said" on the wire."""
    return Epoch(secrets.randbits(64) | 1)


def member_name(slot: WorkerId, tier: int) -> WorkerId:
    """The member that an arena of a slot's process is: the best, tier 0, has the slot's name, the others are
    numbered, such as `attention-1.1`.
    """
    return WorkerId(f"{slot}.{tier}") if tier else slot


@dataclass(frozen=True, slots=True, order=True)
class SequenceKey:
    """One choice of one request."""

    request_id: str
    choice: int = 0

    def __str__(self) -> str:
        return f"{self.request_id}#{self.choice}"


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The shape of the KV cache of one model: all an attention worker knows of it.

    `digest` covers model and RoPE; two processes exchange KV only when their geometries are equal.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    dtype: str
    block_tokens: int
    digest: str

    @property
    def element_bytes(self) -> int:
        """Bytes of one cached number."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers: 2 L (d / G) e in Lamina's notation."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.element_bytes

    @property
    def block_bytes(self) -> int:
        """KV bytes of one block."""
        return self.token_bytes * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens starting at a block's edge."""
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class ShardRef:
    """One shard as a sequence's map names it: positions first..end reserved on one worker's life.

    Invariant of a map: shards are ordered, first = the previous shard's end, only the last one (the
    tail) is appended to.
    """

    worker: WorkerId
    epoch: Epoch
    shard: ShardId
    first: int
    end: int
