"""An attention worker in the same process: monolithic mode, local shards, and tests without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cluster.errors import Unavailable
from cluster.types import Generation, SequenceKey, ShardId
from workers.attention.session import AttendSession
from workers.attention.store import Store
from workers.lanes.inproc import InProcessLane
from workers.lanes.messages import Lane
from workers.peer import Acquisition, Adoption, HeldShard, PullSource, Reservation, ShardPrefix


class LocalPeer:
    """`AttentionPeer` straight on a store; its lanes hand tensors over without a copy."""

    def __init__(self, store: Store, session: Callable[[], AttendSession]) -> None:
        self.worker = store.worker
        self.epoch = store.epoch
        self._store = store
        self._session = session

    def reserve(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        end: int,
        prefix: ShardPrefix,
    ) -> Reservation:
        """See `AttentionPeer.reserve`."""
        return self._store.reserve(key, generation, first, end, prefix)

    def acquire(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        token_ids: Sequence[int],
        prefix: ShardPrefix,
    ) -> Acquisition:
        """See `AttentionPeer.acquire`."""
        return self._store.acquire(key, generation, first, token_ids, prefix)

    def pull(
        self,
        key: SequenceKey,
        generation: Generation,  # noqa: ARG002  # as below: a local arena takes no copies
        first: int,
        token_ids: Sequence[int],  # noqa: ARG002
        prefix: ShardPrefix,  # noqa: ARG002
        source: PullSource,
    ) -> Acquisition:
        """See `AttentionPeer.pull`."""
        raise Unavailable(f"{key}: nothing is copied from {source.address} into a dense worker ({first}..)")

    def release_shard(self, key: SequenceKey, generation: Generation, shard: ShardId) -> int:
        """See `AttentionPeer.release_shard`."""
        return self._store.release_shard(key, generation, shard)

    def release(self, key: SequenceKey, generation: Generation, computed_end: int) -> int:
        """See `AttentionPeer.release`."""
        return self._store.release(key, generation, computed_end)

    def trim(self, key: SequenceKey, generation: Generation, keep_from: int) -> int:
        """See `AttentionPeer.trim`."""
        return self._store.trim(key, generation, keep_from)

    def renew(self, keys: Iterable[SequenceKey]) -> tuple[SequenceKey, ...]:
        """See `AttentionPeer.renew`."""
        return self._store.renew(keys)

    def adopt(self, key: SequenceKey, generation: Generation, token_ids: Sequence[int]) -> Adoption:
        """See `AttentionPeer.adopt`."""
        return self._store.adopt(key, generation, token_ids)

    def locate(self, key: SequenceKey) -> tuple[HeldShard, ...]:
        """See `AttentionPeer.locate`."""
        return self._store.locate(key)

    def open_lane(self) -> Lane:
        """See `AttentionPeer.open_lane`."""
        return InProcessLane(self._session(), on_close=_nothing)

    def close(self) -> None:
        """The store lives on; there is no connection to give up."""


def _nothing() -> None:
    """A lane within the process holds nothing that needs closing."""
