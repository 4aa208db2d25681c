"""How an allotment goes on with the shards that a sequence has. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.policies.placement import Allotment
from cluster.types import ShardRef
from workers.dense.sequences import Placed


def grown_by(shards: Iterable[Placed], allotment: Allotment) -> Placed | None:
    """The shard that an allotment grows; None where it is a new one."""
    for placed in shards:
        if placed.shard.worker == allotment.worker and placed.shard.end == allotment.first:
            return placed
    return None


def known_start(grown: Placed | None, allotment: Allotment) -> int:
    """Where the shard begins, for its prefix. 0, before which nothing lies, for a trimmed one: its worker may
    not have trimmed it yet, or not heard of it.
    """
    if grown is None:
        return allotment.first
    return 0 if grown.is_trimmed else grown.shard.first


def is_meant(reserved: ShardRef, grown: Placed | None, allotment: Allotment) -> bool:
    """Whether the worker gave the room to the shard that the map means."""
    return reserved.first == allotment.first if grown is None else reserved.shard == grown.shard.shard
