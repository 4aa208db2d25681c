"""The part of the configuration file that says where KV and processes go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config_section import Section


class PlacementConfig(Section):
    """Where KV and processes go."""

    shard_tokens: int = Field(
        1024, ge=1, description="A sequence spreads over another worker for each this many tokens."
    )
    max_shards: int = Field(64, ge=1, description="Shards per sequence.")
    instances: Literal["shared", "borrowing", "separate"] = Field(
        "shared",
        description="Whose attention workers a dense worker uses: all alike; its own (attention i is at home "
        "at dense i modulo dense.replicas) and then what others lend; or its own alone.",
    )
    plan_interval_s: float = Field(
        2.0, ge=0, description="How often the controller looks for cache to move; 0 is never."
    )
    move_gain: float = Field(
        0.01,
        ge=0,
        description="What a move must promise: tokens per second of those it concerns, as a share.",
    )
    move_tokens: int = Field(256, ge=1, description="Tokens copied at once when a shard moves.")
    hardware: str | None = Field(None, description="A hardware catalogue instead of the built-in one.")
    dense_classes: tuple[str, ...] = Field((), description="Hardware classes for dense roles, best first.")
    attention_classes: tuple[str, ...] = Field(
        (), description="Hardware classes for attention roles, best first."
    )
    attention_label: str | None = Field(
        None, description="key=value a node must carry to hold attention workers."
    )
    own_addresses: bool = Field(
        False,
        description="Every process has a network address to itself, as a pod has: nothing is added to ports.",
    )
    exclusive: bool = Field(False, description="Demand the custom resources anabranch_dense, ... of a node.")
    elastic: bool = Field(
        False,
        description="As many processes of a role as a joined Ray cluster has nodes for, up to its replicas; "
        "the place of one that was drained is for the next node.",
    )
    timeout_s: float = Field(
        15.0, gt=0, description="A role that finds no node of a joined Ray cluster for this long has failed."
    )
