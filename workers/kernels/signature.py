"""The one signature every attention backend implements; `reference` is its specification.

A kernel computes, for a batch of spans, attention of a few query rows over a range of cached slots
and returns normalised outputs with their log-sum-exp, so that partial results over disjoint ranges
can be merged exactly (Infinite-LLM's DistAttention in the (out, lse) form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer of an arena as its layout left it: what a kernel of that layout reads.

    key, value: token-major, [blocks, block_tokens, kv_heads, head_size], any float dtype; the blocks of
    consecutive ids are adjacent in memory, so a run of ids is one flat [tokens, kv_heads, head_size] slab.
    Another layout extends this class and says what its tensors are.
    """

    key: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What an arena holds, whatever the layout. dtype: that of the numbers in memory, int8 where a layout
    quantises.
    """

    layers: int
    blocks: int
    block_tokens: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype


class CacheLayout(Protocol):
    """How a kernel wants blocks to lie in memory; everyone else sees rows [tokens, kv_heads, head_size].

    Slots are block id x block_tokens + offset, int64 [tokens]; the rows of whole blocks are what moves
    between workers of different layouts.
    """

    name: str

    def allocate(self, shape: CacheShape, device: torch.device) -> tuple[LayerCache, ...]:
        """One cache for each layer, in one piece of memory that is not touched yet."""
        ...

    def append(self, cache: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write rows into slots, converted to the cache's type. Never allocates cache."""
        ...

    def read(self, cache: LayerCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values in slots; float32 where the layout quantises."""
        ...

    def vacate(self, layers: Sequence[LayerCache], first: int, count: int) -> int:
        """Return the memory of blocks first..first+count, all layers, to the system, as far as it is whole
        large pages of the host's; how many bytes went. What lay there is undefined until it is written again.
        """
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """Some consecutive query rows of one sequence and the slots of one shard they may see.

    Rows row_start..row_start+row_count of the batch stand at positions query_position, +1, ...; the
    shard's slot s lies in blocks[s // block_tokens] and holds position first_position + s. Slots
    visible_start..visible_end exist for these rows; with a window w, the row at position p sees
    only positions p - w + 1 .. p (transformers' rule). Visible slots never lie after the rows: the chunk's
    own positions are attended by `Kernel.causal` on the dense side.
    """

    row_start: int
    row_count: int
    query_position: int
    blocks: Sequence[int]
    first_position: int
    visible_start: int
    visible_end: int


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """What KV policies need of a kernel; None everywhere costs nothing.

    bias: [slots] float32, added to every score of a slot (ln |S| for a slot that stands for |S|
    merged tokens). positions: [slots] int64, where slots no longer hold consecutive positions.
    mass_lse: [row_count, query_heads] float32; when given, the kernel returns each slot's attention
    mass against it, sum over rows and heads of exp(score - mass_lse). Slots are those of the whole
    shard, counted from its first block.
    """

    bias: Tensor | None = None
    positions: Tensor | None = None
    mass_lse: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttendResult:
    """out: [rows, query_heads, head_size] float32; lse: [rows, query_heads] float32, -inf where a row
    saw nothing (out is 0 there). mass: per span [slots] float32 or None.
    """

    out: Tensor
    lse: Tensor
    mass: tuple[Tensor | None, ...]


class Kernel(Protocol):
    """An attention backend. Stateless but for memos; safe to call from several threads."""

    name: str

    @property
    def layout(self) -> CacheLayout:
        """That of the caches it attends over; others are refused."""
        ...

    def attend(
        self,
        query: Tensor,
        spans: Sequence[Span],
        cache: LayerCache,
        scale: float,
        window: int | None = None,
        options: Sequence[SlotOptions] | None = None,
    ) -> AttendResult:
        """Attend query [rows, query_heads, head_size] over `cache` (one layer); query head h reads KV head
        h // (query_heads // kv_heads). Rows named by no span come back empty. Raises ValueError on shapes
        or ranges that do not fit.
        """
        ...

    def causal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunks: Sequence[int],
        scale: float,
        window: int | None,
    ) -> AttendResult:
        """Attention of chunks over themselves. query [rows, query_heads, head_size]; key, value [rows,
        kv_heads, head_size]; `chunks` are the row counts of consecutive chunks; row i of a chunk sees its
        rows 0..i (within the window).
        """
        ...


@dataclass(frozen=True, slots=True)
class LaneSocket:
    """Where a lane's frames arrive, and what they are recognised by. `spin_s`: how long to ask for bytes
    before sleeping.
    """

    descriptor: int
    incarnation: int
    wire_version: int
    spin_s: float


class Exchange(Protocol):
    """Answers the messages of one lane that nobody has to look at, straight off its socket: keys and values
    of one layer and the query of the next, of a step that `begin` announced. What else arrives, it hands on.

        begin --> receive --> append, attend --> reply (or finish, where nothing was asked) --> receive
                     |            |
                     +--> take <--+    bytes that somebody else should read

    For one thread.
    """

    layer: int
    """Of the message: its query's; its keys and values are those of the layer before."""
    has_rows: bool
    has_query: bool

    def begin(self, micro_batch: int, step: int, spans: Sequence[Span], rows: int, slots: Tensor) -> None:
        """Answer messages of `step` from now on: `rows` queries over `spans`, keys and values for `slots`,
        int64 [appended rows]. Raises ValueError for what lies outside the arena.
        """
        ...

    def end(self, micro_batch: int) -> None:
        """Answer nothing of its step any more."""
        ...

    def receive(self, wait_s: float) -> int:
        """The micro-batch of the next message; -1 where there is none: see `take`."""
        ...

    def take(self) -> bytes:
        """What came and is not answered, a message just received included; empty where nothing came."""
        ...

    def append(self) -> None:
        """Write the message's keys and values."""
        ...

    def attend(self) -> None:
        """Compute what its query asks for."""
        ...

    def reply(self) -> bytes:
        """Send that; returns what the socket did not take at once. The message is done with."""
        ...

    def finish(self) -> None:
        """The message is done with."""
        ...

    def take_busy(self) -> float:
        """Seconds spent writing and attending since this was asked last."""
        ...

    def take_received(self) -> int:
        """Bytes received since this was asked last, those handed on included."""
        ...

    def take_sent(self) -> int:
        """Bytes sent since this was asked last."""
        ...
