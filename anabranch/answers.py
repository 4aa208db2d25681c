"""What the unary calls answer: typed, immutable values, the same for both clients."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from anabranch.v1 import inference_pb2, types_pb2


class Health(StrEnum):
    """Condition of a gateway."""

    READY = "ready"
    """It serves."""

    NOT_READY = "not ready"
    """It lives, and is starting or draining."""

    UNREACHABLE = "unreachable"
    """It does not answer."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids, and the longest sequence (prompt and output) the model serves."""

    token_ids: tuple[int, ...]
    max_sequence_length: int

    @classmethod
    def from_proto(cls, message: inference_pb2.TokenizeResponse) -> Tokenized:
        """The typed form of a message."""
        return cls(tuple(message.token_ids), message.max_sequence_length)


@dataclass(frozen=True, slots=True)
class Model:
    """A served model. `dilation`: how many times slower its cluster is than one that it emulates, else 1."""

    name: str
    architecture: str
    max_sequence_length: int
    vocabulary_size: int
    parameters: int
    dilation: float

    @classmethod
    def from_proto(cls, message: inference_pb2.Model) -> Model:
        """The typed form of a message."""
        return cls(
            message.name,
            message.architecture,
            message.max_sequence_length,
            message.vocabulary_size,
            message.parameters,
            message.dilation if message.HasField("dilation") else 1.0,
        )


@dataclass(frozen=True, slots=True)
class BlockAccount:
    """Blocks of an arena: free + reserved + open + sealed_referenced + sealed_cached = capacity."""

    capacity: int
    free: int
    reserved: int
    open: int
    sealed_referenced: int
    sealed_cached: int
    block_bytes: int

    @classmethod
    def from_proto(cls, message: inference_pb2.BlockAccount) -> BlockAccount:
        """The typed form of a message."""
        return cls(
            message.capacity,
            message.free,
            message.reserved,
            message.open,
            message.sealed_referenced,
            message.sealed_cached,
            message.block_bytes,
        )


@dataclass(frozen=True, slots=True)
class Member:
    """One live process of the cluster, with its load as last reported.

    `role` is one of gateway, dense, attention, controller; `state` one of starting, ready, draining.
    `blocks` is that of an attention worker's arena and None for all others.
    """

    worker_id: str
    role: str
    epoch: int
    address: str
    state: str
    host: str
    process_id: int
    blocks: BlockAccount | None
    sequences_running: int
    sequences_waiting: int
    streams_open: int
    resident_bytes: int
    resident_peak_bytes: int

    @classmethod
    def from_proto(cls, message: inference_pb2.Member) -> Member:
        """The typed form of a message."""
        load = message.load
        return cls(
            worker_id=message.worker_id,
            role=inference_pb2.Role.Name(message.role).removeprefix("ROLE_").lower(),
            epoch=message.epoch,
            address=message.address,
            state=inference_pb2.MemberState.Name(message.state).removeprefix("MEMBER_STATE_").lower(),
            host=message.host,
            process_id=message.process_id,
            blocks=BlockAccount.from_proto(load.blocks) if load.HasField("blocks") else None,
            sequences_running=load.sequences_running,
            sequences_waiting=load.sequences_waiting,
            streams_open=load.streams_open,
            resident_bytes=load.resident_bytes,
            resident_peak_bytes=load.resident_peak_bytes,
        )


@dataclass(frozen=True, slots=True)
class ShardUsage:
    """One shard of a request's KV cache: positions first..end of one choice, on one attention worker."""

    choice: int
    worker_id: str
    epoch: int
    first_position: int
    end_position: int
    committed_tokens: int
    blocks: int
    bytes: int

    @classmethod
    def from_proto(cls, message: inference_pb2.ShardUsage) -> ShardUsage:
        """The typed form of a message."""
        shard: types_pb2.ShardRef = message.shard
        return cls(
            choice=message.sequence.choice,
            worker_id=shard.worker_id,
            epoch=shard.epoch,
            first_position=shard.first_position,
            end_position=shard.end_position,
            committed_tokens=message.committed_tokens,
            blocks=message.blocks,
            bytes=message.bytes,
        )


@dataclass(frozen=True, slots=True)
class Topology:
    """The cluster as one gateway knows it and, where a request was named, where its KV lies."""

    members: tuple[Member, ...]
    shards: tuple[ShardUsage, ...]

    @classmethod
    def from_proto(cls, message: inference_pb2.GetTopologyResponse) -> Topology:
        """The typed form of a message."""
        return cls(
            tuple(map(Member.from_proto, message.members)),
            tuple(map(ShardUsage.from_proto, message.shards)),
        )
