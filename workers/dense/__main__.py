"""`python -m workers.dense`: one dense worker of a cluster."""

from __future__ import annotations

import contextlib
import time

import torch

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import geometry_value
from cluster.config import TierConfig
from cluster.ending import leave
from cluster.errors import VersionMismatch
from cluster.policies.prefixes import Find
from cluster.types import WorkerId
from workers import role
from workers.attention.core import AttentionCore
from workers.attention.kv_service import account_message
from workers.cores import pin
from workers.dense.finder import CopyFinder, PrefixFinder, find_nothing
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.worker import DenseWorker, LocalArena
from workers.devices import open_device
from workers.kernels.select import select
from workers.kernels.warm_up import warm_up_causal
from workers.membership import MembershipClient
from workers.role import RoleContext

_SERVING = {
    "both": inference_pb2.SERVING_UNSPECIFIED,
    "prefill": inference_pb2.SERVING_PREFILL,
    "decode": inference_pb2.SERVING_DECODE,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROGRESS_S = 2.0
_CONNECT_S = 3.0
"""Longest wait for lanes to the attention workers there are; others may join or leave at any time."""


def serve(context: RoleContext) -> int:
    """Load the model, join, serve until told to stop, hand over what runs."""
    config = context.config
    spin_s = pin(config, "dense", context.index)
    torch.set_num_threads(config.dense.threads)
    decoder = _load(context)
    with contextlib.ExitStack() as stack:
        local = _local_core(context, decoder)
        if local is not None:
            stack.enter_context(local)
        finder = _finder(context, stack)
        worker = _worker(context, decoder, local, finder, spin_s)
        stack.callback(worker.stop)
        return _join_and_serve(context, worker, finder, stack)


def _join_and_serve(
    context: RoleContext, worker: DenseWorker, finder: PrefixFinder | None, stack: contextlib.ExitStack
) -> int:
    def on_change(membership: control_pb2.Membership) -> None:
        worker.set_members(membership.members)

    host = context.config.dense.host
    address = context.reachable(host, worker.port)
    worker.start()
    membership = MembershipClient(
        context,
        inference_pb2.ROLE_DENSE,
        address,
        worker.load,
        on_change,
        context.stop.set,
        context.serve_metrics(worker.engine.metrics.registry, host, worker.port),
        _SERVING[context.config.dense.serves_at(context.index)],
    )
    membership.set_mover(worker.move)
    if finder is not None:
        membership.set_follower(finder.follow)
    stack.callback(membership.close)
    theirs = geometry_value(membership.start().geometry)
    if theirs != worker.geometry:
        raise VersionMismatch(f"the controller serves {theirs}, this worker's model gives {worker.geometry}")
    worker.wait_connected(_CONNECT_S)
    membership.set_state(inference_pb2.MEMBER_STATE_READY)
    context.log.info("serving", address=address)
    worker.engine.failed.add_done_callback(lambda _failed: context.stop.set())
    context.stop.wait()
    membership.set_state(inference_pb2.MEMBER_STATE_DRAINING)
    worker.drain()
    return role.EXIT_FAILED if worker.engine.failed.done() else role.EXIT_OK


def _load(context: RoleContext) -> Decoder:
    """The model, with a log line every few seconds."""
    spoken_s = time.monotonic()

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal spoken_s
        if time.monotonic() - spoken_s >= _PROGRESS_S or done_bytes == total_bytes:
            spoken_s = time.monotonic()
            context.log.info("loading_weights", done_bytes=done_bytes, total_bytes=total_bytes)

    config = context.config
    device = open_device(config.dense.device, "dense.device")
    decoder = Decoder.from_folder(config.model.path, _DTYPES[config.model.dtype], device, progress)
    if device.type == "cuda":
        _warm_up(decoder)
    return decoder


def _warm_up(decoder: Decoder) -> None:
    """Compile and load before the first step what a lane's deadline would not wait for."""
    spec, device = decoder.spec, decoder.device
    heads = (spec.query_heads, spec.kv_heads)
    warm_up_causal(select("auto", device.type), heads, spec.head_size, decoder.dtype, device)
    decoder.logits(torch.zeros(1, spec.hidden_size, dtype=decoder.dtype, device=device))


def _local_core(context: RoleContext, decoder: Decoder) -> AttentionCore | None:
    """The KV cache in this process, where the configuration gives it one (monolithic mode)."""
    config = context.config
    if config.dense.local_arena == 0:
        return None
    geometry = decoder.spec.geometry(config.model.dtype, config.attention.block_tokens)
    tier = TierConfig(device=config.dense.device, arena=config.dense.local_arena)
    name = WorkerId(f"{context.worker_id}-local")
    return AttentionCore(config.attention, tier, geometry, name, context.epoch, emulation=config.emulation)


def _finder(context: RoleContext, stack: contextlib.ExitStack) -> PrefixFinder | None:
    """Who asks for prefixes, where others could have left one; closed with the stack."""
    config = context.config
    if not config.attention.prefix_sharing or config.attention.replicas == 0:
        return None
    otherwise: Find = find_nothing
    if config.registry.url is not None:
        copy = CopyFinder(config.registry)
        stack.callback(copy.close)
        otherwise = copy.find
    finder = PrefixFinder(context.controller, config.security.tls, otherwise=otherwise)
    stack.callback(finder.close)
    return finder


def _worker(
    context: RoleContext,
    decoder: Decoder,
    local: AttentionCore | None,
    finder: PrefixFinder | None,
    spin_s: float,
) -> DenseWorker:
    serves = context.config.dense.serves_at(context.index)
    arena = local_arena(local) if local is not None else None
    find = finder.find if finder is not None else None
    return DenseWorker(context.config, decoder, context.worker_id, context.epoch, arena, spin_s, serves, find)


def local_arena(local: AttentionCore) -> LocalArena:
    """The cache in this process as the worker sees it; a member's account never waits for a computation."""
    store = local.store

    def member() -> AttentionMember:
        account = local.account
        return AttentionMember(
            store.worker, store.epoch, "", account.capacity, account.available, is_local=True
        )

    def blocks() -> inference_pb2.BlockAccount:
        return account_message(local.account, local.arena.geometry)

    return LocalArena(member, blocks, lambda: local.busy_seconds, local.peer())


if __name__ == "__main__":
    leave(role.run("dense", serve))
