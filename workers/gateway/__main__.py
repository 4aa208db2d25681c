"""A gateway process: `python -m workers.gateway --config FILE --controller HOST:PORT`."""

from __future__ import annotations

import asyncio
import sys
import threading

from anabranch.v1 import control_pb2, inference_pb2
from workers import role
from workers.gateway.dense_link import GatewayIdentity
from workers.gateway.gateway import Gateway
from workers.gateway.served_model import ServedModel
from workers.membership import MembershipClient
from workers.role import RoleContext

_LEAVE_S = 2.0
"""Part of the grace kept for telling those that did not finish to resume elsewhere."""


def serve(context: RoleContext) -> None:
    """Run until told to stop, then drain."""
    asyncio.run(_serve(context))


async def _serve(context: RoleContext) -> None:
    model = await asyncio.to_thread(ServedModel.load, context.config)
    identity = GatewayIdentity(context.worker_id, context.epoch)
    gateway = Gateway(context.config, identity, model, context.index)
    try:
        await gateway.start()
        await _join_and_serve(context, gateway)
    finally:
        await gateway.stop()


async def _join_and_serve(context: RoleContext, gateway: Gateway) -> None:
    loop = asyncio.get_running_loop()
    stopping = _stop_event(context.stop, loop)

    def on_change(membership: control_pb2.Membership) -> None:
        loop.call_soon_threadsafe(gateway.set_membership, membership)

    host = context.config.gateway.host
    address = context.reachable(host, gateway.port)
    client = MembershipClient(
        context,
        inference_pb2.ROLE_GATEWAY,
        address,
        gateway.load,
        on_change,
        on_fenced=context.stop.set,
        metrics_address=context.serve_metrics(gateway.metrics.registry, host, gateway.port),
    )
    try:
        await asyncio.to_thread(client.start)
        client.set_state(inference_pb2.MEMBER_STATE_READY)
        await stopping.wait()
        client.set_state(inference_pb2.MEMBER_STATE_DRAINING)
        grace_s = await asyncio.to_thread(client.grace_s)
        await gateway.drain(max(0.0, grace_s - _LEAVE_S))
    finally:
        await asyncio.to_thread(client.close)


def _stop_event(stop: threading.Event, loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """The role's stop as something a coroutine can wait for."""
    stopping = asyncio.Event()

    def relay() -> None:
        stop.wait()
        loop.call_soon_threadsafe(stopping.set)

    threading.Thread(target=relay, name="stop", daemon=True).start()
    return stopping


if __name__ == "__main__":
    sys.exit(role.run("gateway", serve))
