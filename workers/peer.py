"""What a dense worker asks of an attention worker, wherever that lies.

Two implementations: over gRPC and a lane (`workers.dense.remote_peer`), and in the same process
(`workers.attention.local_peer`, monolithic mode and local shards).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.blocks import BlockHash
from cluster.types import Epoch, Generation, SequenceKey, ShardId, ShardRef, WorkerId
from workers.lanes.messages import Lane


@dataclass(frozen=True, slots=True)
class Reservation:
    """A granted reservation: the shard with its whole range, the lease, and what is left."""

    shard: ShardRef
    lease_ms: int
    blocks_available: int


@dataclass(frozen=True, slots=True)
class ShardPrefix:
    """What gives a shard's blocks their identities: the tenant, and the identity of the block before it (None
    while its tokens are not known, and at position 0).
    """

    tenant: str = ""
    parent: BlockHash | None = None


@dataclass(frozen=True, slots=True)
class HeldShard:
    """A shard as its holder knows it; `committed_tokens` count from the shard's first position."""

    shard: ShardRef
    committed_tokens: int
    blocks: int
    generation: Generation

    @property
    def committed_end(self) -> int:
        """One past its last committed position."""
        return self.shard.first + self.committed_tokens


@dataclass(frozen=True, slots=True)
class Acquisition:
    """What was found of a shard's tokens, and what is left."""

    shard: HeldShard | None
    blocks_available: int


@dataclass(frozen=True, slots=True)
class Adoption:
    """What a take-over left of a sequence at one worker. Keys and values depend on every token before them:
    behind `first_difference`, the first position whose token there was not the adopter's, none are right.
    """

    shards: tuple[HeldShard, ...] = ()
    first_difference: int | None = None


@dataclass(frozen=True, slots=True)
class PullSource:
    """Where committed KV is copied from: the holder's address, its shard, and which life holds it there; and
    whether the copy begins with this piece.
    """

    address: str
    shard: ShardRef
    generation: Generation
    begins: bool


class AttentionPeer(Protocol):
    """One life of one attention worker. Calls block up to a deadline and raise errors of the tree:
    ResourceExhausted, Fenced, Unavailable. Safe to call from several threads, the lane excepted.
    """

    worker: WorkerId
    epoch: Epoch

    def reserve(
        self, key: SequenceKey, generation: Generation, first: int, end: int, prefix: ShardPrefix
    ) -> Reservation:
        """Reserve positions first..end, extending the own shard that ends at `first` if there is one."""
        ...

    def acquire(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        token_ids: Sequence[int],
        prefix: ShardPrefix,
    ) -> Acquisition:
        """Begin a shard at `first` with what lies there already of its tokens."""
        ...

    def pull(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        token_ids: Sequence[int],
        prefix: ShardPrefix,
        source: PullSource,
    ) -> Acquisition:
        """Copy committed KV of these tokens from another worker; see `KvService.Pull`."""
        ...

    def release(self, key: SequenceKey, generation: Generation, computed_end: int) -> int:
        """Free all shards of a sequence, of which positions before `computed_end` were computed; returns how
        many blocks became available. Idempotent.
        """
        ...

    def release_shard(self, key: SequenceKey, generation: Generation, shard: ShardId) -> int:
        """Free one shard of a sequence that goes on; returns how many blocks became available. Idempotent."""
        ...

    def trim(self, key: SequenceKey, generation: Generation, keep_from: int) -> int:
        """Give back whole blocks before a position that no row will see any more; returns how many became
        available. Idempotent.
        """
        ...

    def renew(self, keys: Iterable[SequenceKey]) -> tuple[SequenceKey, ...]:
        """Renew leases; returns the sequences that hold nothing here."""
        ...

    def adopt(self, key: SequenceKey, generation: Generation, token_ids: Sequence[int]) -> Adoption:
        """Take a sequence over: fence lower generations, truncate to what `token_ids` confirm."""
        ...

    def locate(self, key: SequenceKey) -> tuple[HeldShard, ...]:
        """The sequence's shards here, possibly none."""
        ...

    def open_lane(self) -> Lane:
        """A new lane. Raises VersionMismatch naming the field that differs, or Unavailable."""
        ...

    def close(self) -> None:
        """Give up the connection. Idempotent."""
        ...
