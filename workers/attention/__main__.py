"""`python -m workers.attention`: one attention worker of a cluster."""

from __future__ import annotations

import contextlib
from time import monotonic

import torch
from prometheus_client import CollectorRegistry

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import geometry_value
from cluster.ending import leave
from workers import role
from workers.attention.metrics import AttentionMetrics
from workers.attention.worker import AttentionWorker
from workers.cores import pin
from workers.membership import MembershipClient
from workers.role import RoleContext

_USERS = (inference_pb2.ROLE_GATEWAY, inference_pb2.ROLE_DENSE)
"""Whose sequences lie here, or who may bring one back from its dense worker's death."""


class _Arena:
    """One arena of this process: a worker with servers of its own, and a member."""

    def __init__(
        self, context: RoleContext, worker: AttentionWorker, tier: int, metrics_address: str
    ) -> None:
        self._stop = context.stop
        self.worker = worker
        self.address = context.reachable(context.config.attention.host, worker.port)
        self.membership = MembershipClient(
            context,
            inference_pb2.ROLE_ATTENTION,
            self.address,
            self.worker.load,
            self._on_change,
            context.stop.set,
            metrics_address,
            tier=tier,
        )

    def close(self) -> None:
        """Leave, and end lanes and calls."""
        self.membership.close()
        self.worker.stop()

    def drain(self) -> None:
        """Take no new sequences, and let those held leave."""
        self.worker.drain()
        self.membership.set_state(inference_pb2.MEMBER_STATE_DRAINING)
        self._on_change(self.membership.membership())

    def _on_change(self, membership: control_pb2.Membership) -> None:
        """Once told to stop: what is held is of use only while somebody is there who could use it."""
        if self._stop.is_set() and not any(member.role in _USERS for member in membership.members):
            self.worker.forsake()


def serve(context: RoleContext) -> None:
    """Join with every arena, serve until told to stop, then wait for the sequences held here to leave."""
    config = context.config
    spin_s = pin(config, "attention", context.index)
    torch.set_num_threads(config.attention.threads)
    workers = [
        AttentionWorker(config, context.worker_id, context.epoch, spin_s, tier)
        for tier in range(len(config.attention.every_tier))
    ]
    registry = CollectorRegistry()  # empty until the controller has said how the cache is shaped
    metrics_address = context.serve_metrics(registry, config.attention.host, workers[0].port)
    with contextlib.ExitStack() as stack:
        arenas = []
        for tier, worker in enumerate(workers):
            arenas.append(_Arena(context, worker, tier, metrics_address))
            stack.callback(arenas[-1].close)
        _join(context, arenas)
        registry.register(AttentionMetrics([arena.worker for arena in arenas]))
        context.stop.wait()
        for arena in arenas:
            arena.drain()
        end_s = monotonic() + arenas[0].membership.grace_s()
        for arena in arenas:
            arena.worker.core.store.empty.wait(max(0.0, end_s - monotonic()))


def _join(context: RoleContext, arenas: list[_Arena]) -> None:
    """Form and serve every arena. The slot counts as ready when the first one is: it comes last."""
    first, *others = arenas
    geometry = geometry_value(first.membership.start().geometry)
    for arena in arenas:
        arena.worker.start(geometry)
        arena.membership.set_pool(arena.worker.core.journal)
    for arena in others:
        arena.membership.set_state(inference_pb2.MEMBER_STATE_READY)
        arena.membership.start()
    first.membership.set_state(inference_pb2.MEMBER_STATE_READY)
    blocks = [arena.worker.core.arena.blocks for arena in arenas]
    context.log.info("serving", addresses=[arena.address for arena in arenas], blocks=blocks)


if __name__ == "__main__":
    leave(role.run("attention", serve))
