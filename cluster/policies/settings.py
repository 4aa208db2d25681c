"""What the configuration says to the policies: of a dense worker, and of a simulated one. Pure."""

from __future__ import annotations

from cluster.config import Config
from cluster.policies.placement import PlacementPolicy
from cluster.policies.scheduler import SchedulerLimits


def scheduler_limits(config: Config, max_sequence_length: int, window_tokens: int | None) -> SchedulerLimits:
    """Of one dense worker, for a model of this context length whose widest window this is."""
    return SchedulerLimits(
        step_tokens=config.dense.step_tokens,
        max_batch=config.dense.max_batch,
        max_waiting=config.dense.max_waiting,
        reserve_ahead_tokens=config.dense.reserve_ahead_tokens,
        max_sequence_length=max_sequence_length,
        window_tokens=window_tokens,
    )


def placement_policy(config: Config) -> PlacementPolicy:
    """Where room is asked for."""
    return PlacementPolicy(
        block_tokens=config.attention.block_tokens,
        shard_tokens=config.placement.shard_tokens,
        max_shards=config.placement.max_shards,
    )
