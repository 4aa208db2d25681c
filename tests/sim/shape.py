"""How large a simulated cluster is, what it serves, and how fast its clocks run."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import Config
from cluster.config_values import Serves
from tests.sim.world import World

HEARTBEAT_S = 0.2
EXPIRY_S = 1.0
LEASE_S = 3.0
ORPHAN_S = 2.0
GRACE_S = 8.0
_SPLITS: tuple[tuple[Serves, ...], ...] = (
    ("prefill", "decode"),
    ("decode", "prefill"),
    ("prefill", "both"),
    ("both", "decode"),
)


@dataclass(frozen=True)
class Shape:
    """How large a simulated cluster is, and what it serves."""

    attention: int
    dense: int
    gateways: int
    blocks: int
    block_tokens: int
    requests: int
    window: int | None
    micro_batches: int
    step_tokens: int
    instances: str
    tiers: int
    serves: tuple[Serves, ...]
    max_batch: int
    max_waiting: int
    max_finished: int

    @classmethod
    def drawn(cls, world: World) -> Shape:
        """Another one for each seed."""
        rng = world.rng
        dense = rng.randint(1, 3)
        return cls(
            attention=rng.randint(1, 4),
            dense=dense,
            gateways=rng.randint(1, 2),
            blocks=rng.choice((24, 40, 80)),
            block_tokens=rng.choice((4, 8)),
            requests=rng.randint(4, 14),
            window=rng.choice((None, None, None, 24)),
            micro_batches=rng.choice((1, 2)),
            step_tokens=rng.choice((16, 40)),
            instances=rng.choice(("shared", "shared", "borrowing")),
            tiers=rng.choice((1, 2)),
            serves=rng.choice(_SPLITS) if dense > 1 and rng.random() < 0.5 else ("both",),
            max_batch=rng.choice((2, 8, 8)),
            max_waiting=rng.choice((2, 64, 64)),
            max_finished=rng.choice((1, 64)),
        )

    def config(self) -> Config:
        """The cluster's configuration."""
        return Config.model_validate(
            {
                "dense": {
                    "replicas": self.dense,
                    "step_tokens": self.step_tokens,
                    "max_batch": self.max_batch,
                    "max_waiting": self.max_waiting,
                    "max_finished": self.max_finished,
                    "serves": self.serves,
                    "reserve_ahead_tokens": 8,
                    "micro_batches": self.micro_batches,
                    "orphan_grace_ms": int(ORPHAN_S * 1000),
                },
                "attention": {
                    "replicas": self.attention,
                    "block_tokens": self.block_tokens,
                    "lease_ms": int(LEASE_S * 1000),
                    "slice_rows": 8,
                },
                "placement": {
                    "shard_tokens": 24,
                    "max_shards": 12,
                    "instances": self.instances,
                    "plan_interval_s": 0.7,
                    "move_gain": 0.0,
                    "move_tokens": 8,
                },
                "lanes": {"deadline_floor_ms": 10},
                "controller": {
                    "heartbeat_ms": int(HEARTBEAT_S * 1000),
                    "expiry_ms": int(EXPIRY_S * 1000),
                },
            }
        )
