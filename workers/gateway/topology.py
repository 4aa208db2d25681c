"""Who is in the cluster, and where the KV of one live request lies: asked of those who hold it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from anabranch import wire
from anabranch.v1 import control_pb2, inference_pb2, kv_pb2, kv_pb2_grpc
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import NotFound
from cluster.telemetry import logger
from workers.gateway.callers import Caller
from workers.gateway.choice import Choice
from workers.gateway.desk import Desk

_log = logger("gateway.topology")

_LOCATE_TIMEOUT_S = 2.0


class Topology:
    """Answers GetTopology. An attention worker that does not answer in time is left out and logged; a
    dense worker's own arena answers nobody, so monolithic mode shows no shards.
    """

    def __init__(self, desk: Desk, membership: Callable[[], control_pb2.Membership], tls: TlsConfig) -> None:
        self._desk = desk
        self._membership = membership
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def describe(self, request_id: str | None, caller: Caller) -> inference_pb2.GetTopologyResponse:
        """Members, and the shards of a request if one is named. Raises NotFound."""
        members = list(self._membership().members)
        if request_id is None:
            return inference_pb2.GetTopologyResponse(members=members)
        live = self._desk.find(request_id, caller)
        if live is None:
            raise NotFound(f"no live request {request_id!r} at this gateway")
        await self._forget_strangers({member.address for member in members})
        questions = [
            self._locate(member, choice, request_id)
            for choice in live.choices
            for member in members
            if member.role == inference_pb2.ROLE_ATTENTION
        ]
        shards = [shard for answer in await asyncio.gather(*questions) for shard in answer]
        shards.sort(key=lambda usage: (usage.sequence.choice, usage.shard.first_position))
        return inference_pb2.GetTopologyResponse(members=members, shards=shards)

    async def close(self) -> None:
        """Close the channels."""
        await self._forget_strangers(set())

    async def _locate(
        self, member: inference_pb2.Member, choice: Choice, request_id: str
    ) -> list[inference_pb2.ShardUsage]:
        stub = kv_pb2_grpc.KvServiceStub(self._channel(member.address))
        try:
            answer = await stub.Locate(
                kv_pb2.LocateRequest(sequence=wire.sequence_message(choice.key)), timeout=_LOCATE_TIMEOUT_S
            )
        except grpc.RpcError as error:
            _log.warning("locate_failed", member=member.worker_id, problem=rpc.from_rpc(error).message)
            return []
        key = wire.sequence_message(choice.key)
        key.request_id = request_id  # the name the client knows, without its tenant
        return [
            inference_pb2.ShardUsage(
                sequence=key,
                shard=held.shard,
                committed_tokens=held.committed_tokens,
                blocks=held.blocks,
                bytes=held.blocks * member.load.blocks.block_bytes,
            )
            for held in answer.shards
        ]

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.aio_channel(address, self._tls)
        return self._channels[address]

    async def _forget_strangers(self, addresses: set[str]) -> None:
        for address in self._channels.keys() - addresses:
            await self._channels.pop(address).close()
