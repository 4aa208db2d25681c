"""An attention worker in another process, as `workers.peer` asks for it: gRPC and a lane."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import grpc

from anabranch import wire
from anabranch.v1 import kv_pb2, kv_pb2_grpc, types_pb2
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import Unavailable
from cluster.types import Generation, SequenceKey, ShardId
from workers.dense.members import AttentionMember
from workers.lanes.dial import Caller, dial
from workers.lanes.messages import Lane
from workers.peer import Acquisition, Adoption, HeldShard, PullSource, Reservation, ShardPrefix

_TIMEOUT_S = 3.0
"""Of every call: the store answers from memory, so a longer silence means that it does not live."""

_PULL_S = 12.0
"""Of a copy from another worker, which has its own, shorter deadline there."""

_T = TypeVar("_T")


class RemotePeer:
    """`AttentionPeer` over `KvService` and `OpenLane`; the channel connects when first used."""

    def __init__(self, member: AttentionMember, caller: Caller, tls: TlsConfig) -> None:
        self.worker = member.worker
        self.epoch = member.epoch
        self._address = member.address
        self._caller = caller
        self._channel = rpc.channel(member.address, tls)
        self._stub = kv_pb2_grpc.KvServiceStub(self._channel)
        self._believed = types_pb2.Believed(epoch=member.epoch)

    def reserve(
        self, key: SequenceKey, generation: Generation, first: int, end: int, prefix: ShardPrefix
    ) -> Reservation:
        """See `AttentionPeer.reserve`."""
        request = kv_pb2.ReserveRequest(
            **self._shard(key, generation, first, prefix),
            end_position=end,
        )
        response = _call(lambda: self._stub.Reserve(request, timeout=_TIMEOUT_S))
        return Reservation(wire.shard_ref(response.shard), response.lease_ms, response.blocks_available)

    def acquire(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        token_ids: Sequence[int],
        prefix: ShardPrefix,
    ) -> Acquisition:
        """See `AttentionPeer.acquire`."""
        request = kv_pb2.AcquireRequest(
            **self._shard(key, generation, first, prefix),
            token_ids=token_ids,
        )
        return _acquisition(_call(lambda: self._stub.Acquire(request, timeout=_TIMEOUT_S)))

    def pull(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        token_ids: Sequence[int],
        prefix: ShardPrefix,
        source: PullSource,
    ) -> Acquisition:
        """See `AttentionPeer.pull`."""
        request = kv_pb2.PullRequest(
            **self._shard(key, generation, first, prefix),
            token_ids=token_ids,
            source_address=source.address,
            source=wire.shard_message(source.shard),
            source_generation=source.generation,
            begins=source.begins,
        )
        return _acquisition(_call(lambda: self._stub.Pull(request, timeout=_PULL_S)))

    def _shard(
        self, key: SequenceKey, generation: Generation, first: int, prefix: ShardPrefix
    ) -> dict[str, Any]:
        """What every request about room at `first` begins with."""
        return {
            "believed": self._believed,
            "sequence": wire.sequence_message(key),
            "generation": generation,
            "first_position": first,
            "tenant": prefix.tenant,
            "parent_hash": prefix.parent or b"",
        }

    def release(self, key: SequenceKey, generation: Generation, computed_end: int) -> int:
        """See `AttentionPeer.release`."""
        return self._release(key, generation, None, computed_end)

    def release_shard(self, key: SequenceKey, generation: Generation, shard: ShardId) -> int:
        """See `AttentionPeer.release_shard`."""
        return self._release(key, generation, shard, 0)

    def _release(
        self, key: SequenceKey, generation: Generation, shard: ShardId | None, computed_end: int
    ) -> int:
        request = kv_pb2.ReleaseRequest(
            believed=self._believed,
            sequence=wire.sequence_message(key),
            generation=generation,
            shard_id=shard,
            computed_end=computed_end,
        )
        return _call(lambda: self._stub.Release(request, timeout=_TIMEOUT_S)).blocks_released

    def trim(self, key: SequenceKey, generation: Generation, keep_from: int) -> int:
        """See `AttentionPeer.trim`."""
        request = kv_pb2.TrimRequest(
            believed=self._believed,
            sequence=wire.sequence_message(key),
            generation=generation,
            keep_from_position=keep_from,
        )
        return _call(lambda: self._stub.Trim(request, timeout=_TIMEOUT_S)).blocks_released

    def renew(self, keys: Iterable[SequenceKey]) -> tuple[SequenceKey, ...]:
        """See `AttentionPeer.renew`."""
        request = kv_pb2.RenewRequest(believed=self._believed, sequences=map(wire.sequence_message, keys))
        response = _call(lambda: self._stub.Renew(request, timeout=_TIMEOUT_S))
        return tuple(map(wire.sequence_key, response.unknown))

    def adopt(self, key: SequenceKey, generation: Generation, token_ids: Sequence[int]) -> Adoption:
        """See `AttentionPeer.adopt`."""
        request = kv_pb2.AdoptRequest(
            believed=self._believed,
            sequence=wire.sequence_message(key),
            generation=generation,
            token_ids=token_ids,
        )
        response = _call(lambda: self._stub.Adopt(request, timeout=_TIMEOUT_S))
        differs_at = response.first_difference if response.HasField("first_difference") else None
        return Adoption(tuple(map(_held, response.shards)), differs_at)

    def locate(self, key: SequenceKey) -> tuple[HeldShard, ...]:
        """See `AttentionPeer.locate`."""
        request = kv_pb2.LocateRequest(sequence=wire.sequence_message(key))
        return tuple(map(_held, _call(lambda: self._stub.Locate(request, timeout=_TIMEOUT_S)).shards))

    def open_lane(self) -> Lane:
        """See `AttentionPeer.open_lane`."""
        return dial(self._channel, self._address, self.epoch, self._caller)

    def close(self) -> None:
        """Close the channel, and with it a lane that runs over it. Idempotent."""
        self._channel.close()


def _call(call: Callable[[], _T]) -> _T:
    try:
        return call()
    except grpc.RpcError as error:
        raise rpc.from_rpc(error) from error
    except ValueError as error:  # how gRPC refuses a call on a channel that another thread closed just now
        raise Unavailable("the connection to the attention worker was given up") from error


def _acquisition(response: kv_pb2.AcquireResponse | kv_pb2.PullResponse) -> Acquisition:
    shard = _held(response.shard) if response.HasField("shard") else None
    return Acquisition(shard, response.blocks_available)


def _held(held: kv_pb2.HeldShard) -> HeldShard:
    return HeldShard(
        wire.shard_ref(held.shard), held.committed_tokens, held.blocks, Generation(held.generation)
    )
