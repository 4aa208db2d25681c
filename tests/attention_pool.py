"""The pool's service of an attention worker as a dense worker calls it."""

from __future__ import annotations

from typing import TypeVar

import grpc

from anabranch.v1 import kv_pb2, kv_pb2_grpc, types_pb2
from anabranch.wire import sequence_message
from cluster import rpc
from cluster.types import Epoch, ShardId
from tests.attention_worker import BLOCKS, EPOCH, SmallSequence

Request = TypeVar("Request")
Response = TypeVar("Response")


class Pool:
    """`KvService` as a dense worker calls it; errors of the tree are raised."""

    def __init__(self, channel: grpc.Channel, epoch: Epoch = EPOCH) -> None:
        self.stub = kv_pb2_grpc.KvServiceStub(channel)
        self.believed = types_pb2.Believed(epoch=epoch)

    def reserve(self, sequence: SmallSequence, first: int, end: int, generation: int = 1) -> ShardId:
        """Reserve; the shard's id."""
        request = kv_pb2.ReserveRequest(
            believed=self.believed,
            sequence=sequence_message(sequence.key),
            generation=generation,
            first_position=first,
            end_position=end,
        )
        return ShardId(call(self.stub.Reserve, request).shard.shard_id)

    def acquire(self, sequence: SmallSequence, first: int, end: int, tenant: str = "") -> tuple[ShardId, int]:
        """Begin a shard with what lies there of positions first..end; its id and tokens, or (0, 0)."""
        request = kv_pb2.AcquireRequest(
            believed=self.believed,
            sequence=sequence_message(sequence.key),
            generation=sequence.generation,
            first_position=first,
            token_ids=sequence.token_ids[first:end],
            tenant=tenant,
        )
        found = call(self.stub.Acquire, request).shard
        return ShardId(found.shard.shard_id), found.committed_tokens

    def release(self, sequence: SmallSequence, generation: int = 1) -> int:
        """Release; the blocks freed."""
        request = kv_pb2.ReleaseRequest(
            believed=self.believed, sequence=sequence_message(sequence.key), generation=generation
        )
        return call(self.stub.Release, request).blocks_released

    def trim(self, sequence: SmallSequence, keep_from: int, generation: int = 1) -> int:
        """Give back what lies before a position; the blocks that became available."""
        request = kv_pb2.TrimRequest(
            believed=self.believed,
            sequence=sequence_message(sequence.key),
            generation=generation,
            keep_from_position=keep_from,
        )
        return call(self.stub.Trim, request).blocks_released

    def adopt(self, sequence: SmallSequence, generation: int, token_ids: tuple[int, ...]) -> list[int]:
        """Take over; the committed lengths."""
        request = kv_pb2.AdoptRequest(
            believed=self.believed,
            sequence=sequence_message(sequence.key),
            generation=generation,
            token_ids=token_ids,
        )
        return [shard.committed_tokens for shard in call(self.stub.Adopt, request).shards]

    def locate(self, sequence: SmallSequence) -> list[int]:
        """The committed lengths of the sequence's shards."""
        request = kv_pb2.LocateRequest(sequence=sequence_message(sequence.key))
        return [shard.committed_tokens for shard in call(self.stub.Locate, request).shards]

    def renew(self, *sequences: SmallSequence) -> list[str]:
        """Renew; the requests not held."""
        request = kv_pb2.RenewRequest(
            believed=self.believed, sequences=[sequence_message(sequence.key) for sequence in sequences]
        )
        return [key.request_id for key in call(self.stub.Renew, request).unknown]

    def audit(self) -> kv_pb2.AuditResponse:
        """The account, checked."""
        response = call(self.stub.Audit, kv_pb2.AuditRequest())
        blocks = response.blocks
        states = (blocks.free, blocks.reserved, blocks.open, blocks.sealed_referenced, blocks.sealed_cached)
        assert sum(states) == blocks.capacity == BLOCKS
        return response


def call(method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
    """Call with a deadline; errors of the tree are raised."""
    try:
        return method(request, timeout=20)
    except grpc.RpcError as error:
        raise rpc.from_rpc(error) from error
