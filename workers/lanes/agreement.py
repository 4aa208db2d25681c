"""What both sides of a lane derive from the same configuration."""

from __future__ import annotations

from collections.abc import Mapping

from anabranch.v1 import attention_pb2
from cluster.config import Config
from cluster.types import KvGeometry

TRANSPORTS: Mapping[str, attention_pb2.LaneTransport.ValueType] = {
    "local": attention_pb2.LANE_TRANSPORT_LOCAL,
    "tcp": attention_pb2.LANE_TRANSPORT_TCP,
    "grpc": attention_pb2.LANE_TRANSPORT_GRPC,
}
"""Names of `lanes.transports` in the configuration."""

_SECTION_BYTES_MOST = 2**30


def rows_most(config: Config, geometry: KvGeometry) -> int:
    """Most query rows of one message: a whole step at every shard a sequence may have on one worker, as
    far as a section of `_SECTION_BYTES_MOST` bytes holds them.
    """
    row_bytes = geometry.query_heads * geometry.head_size * 4
    return min(config.dense.step_tokens * config.placement.max_shards, _SECTION_BYTES_MOST // row_bytes)
