"""Values of `cluster.types` as protos and back: one translation for every process."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import DecodeError

from anabranch.v1 import control_pb2, types_pb2
from cluster.errors import Internal, VersionMismatch
from cluster.sampling import SamplingParameters
from cluster.types import (
    LAYOUT_VERSION,
    WIRE_VERSION,
    Epoch,
    KvGeometry,
    SequenceKey,
    ShardId,
    ShardRef,
    WorkerId,
)

_DATA_TYPES = {
    "float32": types_pb2.DATA_TYPE_FLOAT32,
    "bfloat16": types_pb2.DATA_TYPE_BFLOAT16,
    "float16": types_pb2.DATA_TYPE_FLOAT16,
}
_DTYPES = {value: name for name, value in _DATA_TYPES.items()}


def sequence_message(key: SequenceKey) -> types_pb2.SequenceKey:
    """A sequence's identity as a proto."""
    return types_pb2.SequenceKey(request_id=key.request_id, choice=key.choice)


def sequence_key(message: types_pb2.SequenceKey) -> SequenceKey:
    """A sequence's identity as a value."""
    return SequenceKey(message.request_id, message.choice)


def shard_message(shard: ShardRef) -> types_pb2.ShardRef:
    """A shard's place as a proto."""
    return types_pb2.ShardRef(
        worker_id=shard.worker,
        epoch=shard.epoch,
        shard_id=shard.shard,
        first_position=shard.first,
        end_position=shard.end,
    )


def shard_ref(message: types_pb2.ShardRef) -> ShardRef:
    """A shard's place as a value."""
    return ShardRef(
        worker=WorkerId(message.worker_id),
        epoch=Epoch(message.epoch),
        shard=ShardId(message.shard_id),
        first=message.first_position,
        end=message.end_position,
    )


def shard_map_message(shards: Iterable[ShardRef]) -> types_pb2.ShardMap:
    """A sequence's map as a proto."""
    return types_pb2.ShardMap(shards=map(shard_message, shards))


def shard_map(message: types_pb2.ShardMap) -> tuple[ShardRef, ...]:
    """A sequence's map as a value."""
    return tuple(map(shard_ref, message.shards))


def geometry_message(geometry: KvGeometry) -> types_pb2.KvGeometry:
    """A cache geometry as a proto."""
    return types_pb2.KvGeometry(
        layers=geometry.layers,
        query_heads=geometry.query_heads,
        kv_heads=geometry.kv_heads,
        head_size=geometry.head_size,
        data_type=_DATA_TYPES[geometry.dtype],
        block_tokens=geometry.block_tokens,
        digest=geometry.digest,
    )


def geometry_value(message: types_pb2.KvGeometry) -> KvGeometry:
    """A cache geometry as a value. Raises VersionMismatch for an element type this version does not know."""
    if message.data_type not in _DTYPES:
        raise VersionMismatch(f"KV data type {message.data_type} is not known here")
    return KvGeometry(
        layers=message.layers,
        query_heads=message.query_heads,
        kv_heads=message.kv_heads,
        head_size=message.head_size,
        dtype=_DTYPES[message.data_type],
        block_tokens=message.block_tokens,
        digest=message.digest,
    )


def sampling_value(message: types_pb2.SamplingParameters) -> SamplingParameters:
    """Sampling parameters as a value, unchecked; an absent field takes its one default."""
    present = {field.name: value for field, value in message.ListFields()}
    given = {name: value for name, value in present.items() if name not in ("logit_bias", "stop_token_ids")}
    return SamplingParameters(
        **given, logit_bias=dict(message.logit_bias), stop_token_ids=tuple(message.stop_token_ids)
    )


def registration(body: bytes) -> control_pb2.RegisterRequest:
    """A member as the registry keeps it. Raises Internal for bytes that are none."""
    try:
        return control_pb2.RegisterRequest.FromString(body)
    except DecodeError as error:
        raise Internal("a member's record cannot be read") from error


def agreement(config_digest: str) -> str:
    """What two processes of one cluster must have in common, as one text to compare."""
    return f"wire {WIRE_VERSION}, layout {LAYOUT_VERSION}, configuration {config_digest}"
