"""`python -m workers.attention`: one attention worker of a cluster."""

from __future__ import annotations

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


def serve(context: RoleContext) -> None:
    """Join, serve until told to stop, then wait for the sequences held here to leave."""
    config = context.config
    spin_s = pin(config, "attention", context.index)
    torch.set_num_threads(config.attention.threads)
    worker = AttentionWorker(config, context.worker_id, context.epoch, spin_s)
    address = context.reachable(config.attention.host, worker.port)

    def on_change(membership: control_pb2.Membership) -> None:
        """Once told to stop: what is held is of use only while somebody is there who could use it."""
        if context.stop.is_set() and not any(member.role in _USERS for member in membership.members):
            worker.forsake()

    registry = CollectorRegistry()  # empty until the controller has said how the cache is shaped
    membership = MembershipClient(
        context,
        inference_pb2.ROLE_ATTENTION,
        address,
        worker.load,
        on_change,
        context.stop.set,
        context.serve_metrics(registry, config.attention.host),
    )
    try:
        worker.start(geometry_value(membership.start().geometry))
        registry.register(AttentionMetrics(worker.core, worker.lanes))
        membership.set_pool(worker.core.journal)
        membership.set_state(inference_pb2.MEMBER_STATE_READY)
        context.log.info("serving", address=address, blocks=worker.core.arena.blocks)
        context.stop.wait()
        membership.set_state(inference_pb2.MEMBER_STATE_DRAINING)
        worker.drain()
        on_change(membership.membership())
        worker.core.store.empty.wait(config.controller.drain_grace_s)
    finally:
        membership.close()
        worker.stop()


if __name__ == "__main__":
    leave(role.run("attention", serve))
