"""The way from a bench's dense worker to an attention worker in a process of its own."""

from __future__ import annotations

from anabranch.cli.bench.step_settings import (
    ATTENTION_EPOCH,
    DENSE_EPOCH,
    DENSE_WORKER,
    StepSettings,
)
from cluster.types import KvGeometry
from workers.cores import spin_s
from workers.dense.members import AttentionMember
from workers.dense.remote_peer import RemotePeer
from workers.lanes.agreement import rows_most
from workers.lanes.dial import Caller


def remote_member(settings: StepSettings, geometry: KvGeometry) -> AttentionMember:
    """The worker that `step_attention` serves, as the controller would announce it."""
    blocks = settings.arena_bytes // geometry.block_bytes
    address = f"127.0.0.1:{settings.attention_port}"
    return AttentionMember(settings.attention_worker, ATTENTION_EPOCH, address, blocks, blocks)


def remote_peer(settings: StepSettings, geometry: KvGeometry) -> RemotePeer:
    """A connection to it."""
    config = settings.config()
    most = rows_most(config, geometry)
    spins_s = spin_s(config, "dense", is_pinned=bool(settings.dense_cores))
    caller = Caller(DENSE_WORKER, DENSE_EPOCH, geometry, config.lanes.transports, most, spins_s)
    return RemotePeer(remote_member(settings, geometry), caller, config.security.tls)
