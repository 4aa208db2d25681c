"""What crosses a lane, as values; `frames` gives their bytes.

One message each way per layer, worker and micro-batch. The dense side sends L + 1 messages a step:

    layer 0      plan, query 0
    layer l      query l, key/value l-1      <- PartialReply l comes back for every query
    layer L      key/value L-1               no reply: needed only by the next step

so the query of a layer leaves before its keys and values exist, and the keys and values ride along
with the next query. A step without rows for a worker sends it nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cluster.types import Generation, ShardId


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One sequence's part of a step at one shard.

    The chunk stands at positions start..start+count. The shard attends exactly positions
    visible_first..visible_end (visible_end <= start). When `token_ids` is not empty this shard is the
    tail: it appends the chunk, whose ids these are (len == count). Naming `start` commits everything
    before it that this shard was given, if all layers arrived; a shard that misses any of it answers
    with a fault.
    """

    shard: ShardId
    generation: Generation
    start: int
    count: int
    visible_first: int
    visible_end: int
    token_ids: tuple[int, ...] = ()

    @property
    def sees(self) -> bool:
        """Whether its queries travel: rows that see nothing there have neither a query nor a partial."""
        return self.visible_first < self.visible_end


@dataclass(frozen=True, slots=True)
class StepPlanDifference:
    """A worker's rows of one step, relative to the rows of `base_step` on the same lane and micro-batch.

    `base_step` None: `changed` are all rows. Otherwise the rows of the base are kept in order, those in
    `removed` dropped; each kept row not in `advanced` or `changed` stays as it was; each shard in
    `advanced` moves on by its previous count (start and, for a tail, visible_end grow by it; count
    becomes the number of its new token ids, or stays for a shard that is not the tail);
    `changed` replace rows of the same shard in place or are appended.
    """

    step: int
    base_step: int | None
    removed: tuple[ShardId, ...]
    advanced: tuple[tuple[ShardId, tuple[int, ...]], ...]
    changed: tuple[PlanRow, ...]


@dataclass(slots=True, eq=False)
class LayerMessage:
    """Dense to attention.

    query: [rows, query_heads, head_size] of `layer`, rows in the order of the plan's rows that see anything,
    or None where none does and after the last layer. key, value: [appended rows, kv_heads, head_size] of
    layer `layer - 1`, for the rows of tail shards in plan order, or None. `deadline_ms`: time the reply may
    take. `window`: the sliding window of `layer`, which differs between layers and which the geometry does
    not tell.
    Nobody changes one; it is not frozen because freezing triples the time to make it.
    """

    step: int
    micro_batch: int
    layer: int
    deadline_ms: int
    plan: StepPlanDifference | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    window: int | None = None


@dataclass(slots=True, eq=False)
class PartialReply:
    """Attention to dense. out: [rows, query_heads, head_size] float32; lse: [rows, query_heads] float32;
    compute_seconds: the worker's own time on this message; transfer_seconds: what moving bytes took it since
    its reply before, 0 where none are moved. Like a message, not frozen for speed.
    """

    step: int
    micro_batch: int
    layer: int
    out: Tensor
    lse: Tensor
    compute_seconds: float
    transfer_seconds: float = 0.0


class Lane(Protocol):
    """The dense side of a lane. One thread uses it, but for `shut_down`; every wait has a deadline."""

    def send(self, message: LayerMessage) -> None:
        """Hand a message over; returns once the tensors may be reused. Raises LaneBroken, and InvalidRequest
        for a message beyond the lane's limits, of which nothing left.
        """
        ...

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:
        """The reply to the query of (step, micro_batch, layer), by the monotonic time `deadline_s`.

        Its tensors are valid until the next message of the same micro-batch is sent.

        Raises the error the worker answered with, or LaneBroken, after which the lane is closed. NeedFull:
        send the layer again with the plan whole (`PlanEncoder.forget`). Fenced: `metadata["shards"]`
        lists the ids of the shards at fault, joined by commas, where they are known; the step is over for
        all its rows at this worker.
        """
        ...

    def shut_down(self) -> None:
        """The other side is gone: whoever waits in the lane, now or later, gets LaneBroken and closes it. For
        other threads.
        """
        ...

    def close(self) -> None:
        """End the lane. Idempotent."""
        ...


class LaneHandler(Protocol):
    """The attention side: given each message of one lane in order, by one thread at a time."""

    def handle(self, message: LayerMessage) -> PartialReply | None:
        """Append, attend; a reply for every query. Raises errors of the tree, which travel back."""
        ...
