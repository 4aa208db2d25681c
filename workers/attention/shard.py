"""One shard: a token range of one sequence, its blocks, and what of it is certain."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.blocks import BlockHash
from cluster.errors import Fenced
from cluster.types import SequenceKey, ShardId


class LayerArrival:
    """Counts the layers of one step's appends; shared by all shards the step appends to.

    A step that a later one supersedes at any of its shards (its lane broke, say, with messages still on the
    way) writes nothing more: it could write below what the later one has made certain.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._arrived = 0
        self._superseded_at: Shard | None = None
        self._over = threading.Event()

    def check(self, layer: int) -> None:
        """Whether `layer` may be written now: layers come in order, each once. Raises Fenced."""
        if self._superseded_at is not None:
            raise self._superseded_at.fenced("a later step writes there")
        if self.is_complete:
            raise Fenced(f"keys of layer {layer} arrived after all {self._layers} layers")
        if layer != self._arrived:
            raise Fenced(f"keys of layer {layer} arrived where layer {self._arrived} was due")

    def is_due(self, layer: int) -> bool:
        """Whether `check` has nothing against `layer`."""
        return self._superseded_at is None and layer == self._arrived < self._layers

    def mark(self, layer: int) -> None:
        """Layer `layer`, which was due, has been written."""
        self.check(layer)
        self._arrived += 1
        if self.is_complete:
            self._over.set()

    def supersede(self, shard: Shard) -> None:
        """A later step writes at `shard`, in place of this one."""
        self._superseded_at = shard
        self._over.set()

    def wait(self, timeout_s: float) -> None:
        """Until every layer is present, or none will come any more. Not for who holds the store's turn."""
        self._over.wait(timeout_s)

    @property
    def is_complete(self) -> bool:
        """Whether every layer is present."""
        return self._arrived == self._layers


@dataclass(frozen=True, slots=True)
class PendingAppend:
    """A chunk being written: certain only when the next step names what follows it."""

    start: int
    token_ids: tuple[int, ...]
    arrival: LayerArrival

    @property
    def end(self) -> int:
        """One past its last position."""
        return self.start + len(self.token_ids)


@dataclass(slots=True, eq=False)
class Shard:
    """Positions first..end of a sequence, reserved; first..committed certain.

        reserved --append--> pending --commit, all layers present--> committed

    Invariants: first <= committed <= end; len(token_ids) == committed - first; every block that holds
    a committed or pending position is in `blocks`. A write at a position >= committed overwrites, one
    below is refused. The first len(hashes) blocks are full, committed and published: they may be other
    shards' too, and nobody writes to them.
    """

    shard_id: ShardId
    key: SequenceKey
    first: int
    end: int
    block_tokens: int
    blocks: list[int]
    token_ids: list[int] = field(default_factory=list)
    pending: PendingAppend | None = None
    parent: BlockHash | None = None
    """Identity of the block before `first`; None while unknown, and nothing is published then."""
    hashes: list[BlockHash] = field(default_factory=list)

    @property
    def sealed(self) -> int:
        """Full, committed blocks."""
        return (self.committed - self.first) // self.block_tokens

    @property
    def committed(self) -> int:
        """One past the last position present in all layers."""
        return self.first + len(self.token_ids)

    @property
    def written(self) -> int:
        """One past the last position any layer may have been written at."""
        return max(self.committed, self.pending.end if self.pending else 0)

    def commit(self, start: int) -> None:
        """Make certain what was appended before `start`. Raises Fenced where layers are missing."""
        pending = self.pending
        if pending is None or start <= pending.start:
            return
        if not pending.arrival.is_complete:
            raise self.fenced(f"positions {pending.start}..{pending.end} miss layers")
        self.token_ids += pending.token_ids[: start - pending.start]
        self.pending = None

    def append(self, start: int, token_ids: tuple[int, ...], arrival: LayerArrival) -> None:
        """Begin to write a chunk at `start`, in place of an uncommitted one. Raises Fenced."""
        self.check_append(start, start + len(token_ids))
        if self.pending is not None:
            self.pending.arrival.supersede(self)
        self.pending = PendingAppend(start, token_ids, arrival)

    def check_append(self, start: int, end: int) -> None:
        """Whether a chunk start..end may be written now. Raises Fenced."""
        if start != self.committed:
            kind = "below" if start < self.committed else "beyond"
            raise self.fenced(f"an append at {start} lies {kind} what is committed, up to {self.committed}")
        if end > self.end:
            raise self.fenced(f"an append to {end} leaves the range reserved, up to {self.end}")

    def truncate(self, token_ids: Sequence[int]) -> int | None:
        """Keep the longest committed prefix that the sequence's `token_ids` confirm; drop what is pending.

        Returns the position of the first token that differs; None where none does, and at most more are
        committed than `token_ids` has.
        """
        confirmed = token_ids[self.first : self.committed]
        same = 0
        while same < len(confirmed) and confirmed[same] == self.token_ids[same]:
            same += 1
        del self.token_ids[same:]
        self.pending = None
        return None if same == len(confirmed) else self.first + same

    def trim(self, keep_from: int) -> list[int]:
        """Give up the whole blocks before a certain position; returns them. Raises Fenced."""
        if keep_from > self.committed:
            raise self.fenced(f"{keep_from} is not certain yet, only what lies before {self.committed}")
        count = max(0, keep_from - self.first) // self.block_tokens
        given_up = self.blocks[:count]
        self.parent = self.hash_before(count)
        self.first += count * self.block_tokens
        del self.blocks[:count], self.hashes[:count], self.token_ids[: count * self.block_tokens]
        return given_up

    def hash_before(self, index: int) -> BlockHash | None:
        """Identity of the block before the shard's block `index`; None where it is not published."""
        if index == 0:
            return self.parent
        return self.hashes[index - 1] if index <= len(self.hashes) else None

    def block_token_ids(self, index: int) -> list[int]:
        """The committed tokens of a block, fewer than a block's where it is open."""
        return self.token_ids[index * self.block_tokens : (index + 1) * self.block_tokens]

    def slot(self, position: int) -> int:
        """Flat slot of a position: block id x block_tokens + offset."""
        block, offset = divmod(position - self.first, self.block_tokens)
        return self.blocks[block] * self.block_tokens + offset

    def fenced(self, what: str) -> Fenced:
        """An error about this shard, naming it."""
        return Fenced(f"{self.key} shard {self.shard_id}: {what}", shards=str(self.shard_id))
