"""A role process that only joins: it registers, says that it is ready, and waits to be told to stop. An
attention worker does so with every arena it would have.

With ROLE_PROGRAM=refuse in its environment it ends as a process does whose configuration is refused,
with ROLE_PROGRAM=stubborn it does not stop when told to.
"""

from __future__ import annotations

import os
import sys
import threading

from anabranch.v1 import inference_pb2
from cluster.errors import ConfigError
from workers import role
from workers.membership import MembershipClient
from workers.role import RoleContext

ROLES = {
    "gateway": inference_pb2.ROLE_GATEWAY,
    "dense": inference_pb2.ROLE_DENSE,
    "attention": inference_pb2.ROLE_ATTENTION,
}


def serve(context: RoleContext) -> int:
    """Be a member until told to stop."""
    mood = os.environ.get("ROLE_PROGRAM")
    if mood == "refuse":
        raise ConfigError("this program was told to refuse")
    role_name = context.worker_id.rpartition("-")[0]
    arenas = len(context.config.attention.every_tier) if role_name == "attention" else 1
    clients = [_client(context, ROLES[role_name], tier) for tier in range(arenas)]
    for client in reversed(clients):  # the slot counts as ready with its first arena
        client.start()
        client.set_state(inference_pb2.MEMBER_STATE_READY)
    context.stop.wait()
    clients[0].set_state(inference_pb2.MEMBER_STATE_DRAINING)
    context.log.info("draining", grace_s=round(clients[0].grace_s()))
    if mood == "stubborn":
        threading.Event().wait()
    for client in clients:
        client.close()
    return 0


def _client(context: RoleContext, role: inference_pb2.Role.ValueType, tier: int) -> MembershipClient:
    return MembershipClient(
        context,
        role,
        f"127.0.0.1:{9000 + context.index + 100 * tier}",
        load=inference_pb2.Load,
        on_change=lambda _membership: None,
        on_fenced=context.stop.set,
        tier=tier,
    )


if __name__ == "__main__":
    sys.exit(role.run("program", serve))
